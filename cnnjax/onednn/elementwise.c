// Loops over images [... C], float32 or bfloat16: batch normalization with GELU, and GELU. Included by kernels.c.
//
// XLA reads such arrays more often, and its loops over bfloat16 are slow. Here, a tile of whole rows is widened to
// float32, computed by a plain loop that the compiler vectorizes, and rounded.

#define TILE 512     // Values of a tile, which is several rows, or one long row.
#define LONG_SUM 64  // Tiles that are added in float32, before their sum is added in float64.
#define MAX_IN 6

typedef union {
  float f;
  uint32_t u;
} Bits;

// Returns `n` values from `start` as float32: in place, or widened to `space`.
static const float* read_values(const void* data, int64_t start, int64_t n, bool bf16, float* restrict space) {
  if (!bf16) return (const float*)data + start;
  const uint16_t* x = (const uint16_t*)data + start;
  for (int64_t i = 0; i < n; i++) space[i] = (Bits){.u = (uint32_t)x[i] << 16}.f;
  return space;
}

// Rounds `n` values to bfloat16: to the nearest, ties to even.
static void write_bf16(const float* x, int64_t n, uint16_t* restrict y) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t u = (Bits){.f = x[i]}.u;
    y[i] = x[i] == x[i] ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fc0;
  }
}

// Returns a · b + c, rounded once if the processor can. The compiler must not choose: the bits would depend on it.
static inline float fma3(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Returns e**x to 2e-7 of its value, with x limited to 87 in magnitude. Source: expf.c of the Cephes library.
static inline float exponential(float x) {
  x = x > 87 ? 87 : x;  // Keeps nan.
  x = x < -87 ? -87 : x;
  float shifted = fma3(x, 1.44269504f, 0x1.8p23f), n = shifted - 0x1.8p23f;  // `n`: x / log(2), rounded.
  float r = fma3(n, 2.12194440e-4f, fma3(n, -0.693359375f, x)), p = 1.9875691500e-4f;
  p = fma3(p, r, 1.3981999507e-3f);
  p = fma3(p, r, 8.3334519073e-3f);
  p = fma3(p, r, 4.1665795894e-2f);
  p = fma3(p, r, 1.6666665459e-1f);
  p = fma3(p, r, 5.0000001201e-1f);
  p = fma3(p, r * r, r) + 1;
  return (Bits){.u = (Bits){.f = p}.u + ((Bits){.f = shifted}.u << 23)}.f;  // p · 2**n
}

// The tanh approximation is x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x**3).
static inline float gelu_of(float x) { return x / (1 + exponential(x * fma3(-0.0713548163f * x, x, -1.59576912f))); }

static inline float gelu_slope(float x) {
  float e = exponential(x * fma3(-0.0713548163f * x, x, -1.59576912f)), s = 1 / (1 + e);
  return fma3(x * (e * s) * s, fma3(0.214064449f * x, x, 1.59576912f), s);
}

// --- Loops over the `n` values of a tile ----------------------------------------------------------------------------
//
// `in`: the operands, of which those of one value per channel are repeated, and missing ones are 0. `a`, `b`: two sums,
// to which the values are added.

typedef void Loop(int64_t n, const float* const* in, float* restrict out, float* restrict a, float* restrict b);

static void norm_sums(int64_t n, const float* const* in, float* restrict out, float* restrict a, float* restrict b) {
  const float* x = in[0];
  for (int64_t i = 0; i < n; i++) {
    a[i] += x[i];
    b[i] = fma3(x[i], x[i], b[i]);
  }
}

static void norm_gelu(int64_t n, const float* const* in, float* restrict out, float* restrict a, float* restrict b) {
  const float *x = in[0], *mean = in[1], *scale = in[2], *bias = in[3], *residual = in[4];
  for (int64_t i = 0; i < n; i++) out[i] = gelu_of(fma3(x[i] - mean[i], scale[i], bias[i]) + residual[i]);
}

// The result is the gradient before the GELU; its sums are those of itself and of its product with the normalized `x`.
static void norm_gelu_grad(int64_t n, const float* const* in, float* restrict out, float* restrict a,
                           float* restrict b) {
  const float *x = in[0], *g = in[1], *mean = in[2], *scale = in[3], *bias = in[4], *residual = in[5];
  for (int64_t i = 0; i < n; i++) {
    float normal = (x[i] - mean[i]) * scale[i], h = g[i] * gelu_slope(normal + bias[i] + residual[i]);
    out[i] = h;
    a[i] += h;
    b[i] = fma3(h, normal, b[i]);
  }
}

static void norm_grad(int64_t n, const float* const* in, float* restrict out, float* restrict a, float* restrict b) {
  const float *x = in[0], *h = in[1], *mean = in[2], *scale = in[3], *mean_h = in[4], *mean_along = in[5];
  for (int64_t i = 0; i < n; i++) out[i] = scale[i] * (h[i] - mean_h[i] - (x[i] - mean[i]) * scale[i] * mean_along[i]);
}

static void gelu(int64_t n, const float* const* in, float* restrict out, float* restrict a, float* restrict b) {
  const float* x = in[0];
  for (int64_t i = 0; i < n; i++) out[i] = gelu_of(x[i]);
}

static void gelu_grad(int64_t n, const float* const* in, float* restrict out, float* restrict a, float* restrict b) {
  const float *x = in[0], *g = in[1];
  for (int64_t i = 0; i < n; i++) out[i] = g[i] * gelu_slope(x[i]);
}

static const struct {
  Loop* loop;
  bool has_result, has_sums;
} kinds[] = {
    // In the order of elementwise.py.
    {norm_sums, false, true}, {norm_gelu, true, false}, {norm_gelu_grad, true, true},
    {norm_grad, true, false}, {gelu, true, false},      {gelu_grad, true, false},
};

// --- Tiles of a part ------------------------------------------------------------------------------------------------

typedef struct {
  Loop* loop;
  int64_t size, channels, tile, num_parts;
  bool bf16;
  const void* in[MAX_IN];     // Images, or NULL.
  const float* rows[MAX_IN];  // Operands of one value per channel, repeated to a tile, or NULL.
  void* out;                  // An image, or NULL.
  double* sums;               // [num_parts 2 C], or NULL.
} Elementwise;

// Adds the sums of a tile, [2 tile], to those of a part, [2 C], and resets them.
static void move_sums(const Elementwise* of, float* tile, double* sums) {
  for (int64_t i = 0; i < 2 * of->tile; i += of->channels) {
    int64_t which = i < of->tile ? 0 : of->channels;
    for (int64_t c = 0; c < of->channels; c++) sums[which + c] += tile[i + c];
  }
  memset(tile, 0, 2 * of->tile * sizeof(float));
}

static dnnl_status_t compute_tiles(const void* call, int64_t part) {
  const Elementwise* of = call;
  int64_t tile = of->tile, num_tiles = (of->size + tile - 1) / tile, last = num_tiles * (part + 1) / of->num_parts;
  Workspace* memory = workspace();
  float* space = memory ? reserve(&memory->scratch, (MAX_IN + 3) * tile * sizeof(float)) : NULL;
  if (!space) return dnnl_out_of_memory;
  float *out = space + MAX_IN * tile, *sums = out + tile;
  memset(sums, 0, 2 * tile * sizeof(float));
  double* all = of->sums ? of->sums + part * 2 * of->channels : NULL;
  for (int64_t t = num_tiles * part / of->num_parts; t < last; t++) {
    int64_t start = t * tile, n = of->size - start < tile ? of->size - start : tile;
    const float* in[MAX_IN];
    for (int k = 0; k < MAX_IN; k++)
      in[k] = of->in[k] ? read_values(of->in[k], start, n, of->bf16, space + k * tile) : of->rows[k];
    of->loop(n, in, of->bf16 || !of->out ? out : (float*)of->out + start, sums, sums + tile);
    if (of->bf16 && of->out) write_bf16(out, n, (uint16_t*)of->out + start);
    if (all && t % LONG_SUM == 0) move_sums(of, sums, all);
  }
  if (all) move_sums(of, sums, all);
  return dnnl_success;
}

// --- Handler --------------------------------------------------------------------------------------------------------

static XLA_FFI_Error* out_of_memory(const XLA_FFI_CallFrame* frame) {
  return new_error(frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "Out of memory.");
}

static bool is_valid(const XLA_FFI_CallFrame* frame) {
  int64_t ins = frame->args.size, outs = frame->rets.size;
  const XLA_FFI_Array* config = frame->attrs.size == 1 ? frame->attrs.attrs[0] : NULL;
  if (!config || frame->attrs.types[0] != XLA_FFI_AttrType_ARRAY || config->dtype != XLA_FFI_DataType_S64) return false;
  int64_t kind = config->size == 1 ? *(int64_t*)config->data : -1, num_kinds = sizeof kinds / sizeof kinds[0];
  if (kind < 0 || kind >= num_kinds || ins < 1 || ins > MAX_IN) return false;
  if (outs != kinds[kind].has_result + kinds[kind].has_sums) return false;
  const XLA_FFI_Buffer** in = (const XLA_FFI_Buffer**)frame->args.args;
  for (int64_t i = 0; i < ins; i++)
    if (in[i]->dtype != (in[i]->rank > 1 ? in[0]->dtype : XLA_FFI_DataType_F32)) return false;
  return in[0]->rank > 1 && (in[0]->dtype == XLA_FFI_DataType_F32 || in[0]->dtype == XLA_FFI_DataType_BF16);
}

// Its only attribute, `config`, is the index in `kinds`. The sums, [2 C], are float32.
XLA_FFI_Error* cnnjax_elementwise(XLA_FFI_CallFrame* frame) {
  if (answers_metadata(frame)) return NULL;
  if (!is_valid(frame))
    return new_error(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                     "The call must be one of cnnjax.onednn.elementwise.");
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer**)frame->args.args, **out = (XLA_FFI_Buffer**)frame->rets.rets, *x = in[0];
  int64_t kind = *(int64_t*)((XLA_FFI_Array*)frame->attrs.attrs[0])->data, threads = num_threads(frame);
  int64_t c = x->dims[x->rank - 1];
  Elementwise of = {.loop = kinds[kind].loop,
                    .size = 1,
                    .channels = c,
                    .tile = c < TILE ? TILE / c * c : c,
                    .num_parts = threads > MIN_PARTS ? threads : MIN_PARTS,
                    .bf16 = dtype(x) == dnnl_bf16,
                    .out = kinds[kind].has_result ? out[0]->data : NULL};
  for (int64_t i = 0; i < x->rank; i++) of.size *= x->dims[i];
  int64_t num_sums = kinds[kind].has_sums ? 2 * c : 0;
  double* memory = calloc(of.num_parts * num_sums * sizeof(double) + MAX_IN * of.tile * sizeof(float), 1);
  if (!memory) return out_of_memory(frame);
  if (num_sums) of.sums = memory;
  float* rows = (float*)(memory + of.num_parts * num_sums);
  for (int64_t k = 0; k < MAX_IN; k++, rows += of.tile) {
    of.rows[k] = rows;
    if (k >= frame->args.size) continue;
    if (in[k]->rank > 1) {
      of.in[k] = in[k]->data;
    } else {
      for (int64_t i = 0; i < of.tile; i += c) memcpy(rows + i, in[k]->data, c * sizeof(float));
    }
  }
  dnnl_status_t status = in_parts(frame, of.num_parts, compute_tiles, &of);
  for (int64_t i = 0; i < num_sums; i++) {
    double sum = 0;
    for (int64_t part = 0; part < of.num_parts; part++) sum += of.sums[part * num_sums + i];
    ((float*)out[frame->rets.size - 1]->data)[i] = sum;
  }
  free(memory);
  return status ? out_of_memory(frame) : NULL;
}
