// The gradient of a bfloat16 kernel on processors with AMX, if rows are short: there oneDNN's is slow, because it
// multiplies each row alone (see BENCHMARKS.md). Included by kernel_grad.c.
//
// The padded images of a part form one stream of pixels, the grid. Neighboring rows share a border of zeros, and so do
// neighboring images. So the pixel that an output meets at a row and column of the kernel has a fixed distance from it,
// and the gradient there is a matrix product over the grid: [C P] · [P K]. Where the grid has no output, the gradient
// of the output is zero. So one infinite or nan value of a channel makes its whole gradient nan.

#if defined(__AMX_BF16__) && defined(__AVX512BW__)
#define HAS_AMX_KERNEL_GRAD
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REQUEST_PERMISSION 0x1023  // ARCH_REQ_XCOMP_PERM of Linux
#define TILE_DATA 18               // XFEATURE_XTILEDATA
#define BLOCK 32                   // Channels, and pixels of one instruction.
#define CHUNK 1024                 // Pixels of the grid that are copied at a time.
#define LONGEST_ROW 24             // Of the output. oneDNN computes those of longer rows.

typedef struct {
  int64_t height, width;  // Of one image in the grid.
  int64_t reach;          // The distance of the last value of a kernel from its first.
  int64_t c_blocks, k_blocks;
  int64_t row;  // Pixels of a row of `transposed`.
} Grid;

static Grid make_grid(const Site* site) {
  int64_t top = site->config.top, bottom = site->config.bottom, left = site->config.left, right = site->config.right;
  Grid grid = {.height = site->image_shape[1] + (top > bottom ? top : bottom),
               .width = site->image_shape[2] + (left > right ? left : right),
               .c_blocks = (site->image_shape[3] + BLOCK - 1) / BLOCK,
               .k_blocks = (site->result_shape[3] + BLOCK - 1) / BLOCK};
  grid.reach = (site->kernel_shape[0] - 1) * grid.width + site->kernel_shape[1] - 1;
  // An odd number of cache lines, so that the rows of a tile do not compete for the same places in the cache.
  grid.row = ((CHUNK + grid.reach + BLOCK - 1) / BLOCK | 1) * BLOCK;
  return grid;
}

// Linux lets a process use the tiles only after it has asked.
static bool has_tiles(void) {
  unsigned amx = dnnl_cpu_isa_avx512_core_amx;
  return (dnnl_get_effective_cpu_isa() & amx) == amx && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Returns whether `amx_kernel_grad` can compute this gradient, and wastes little: on channels that only fill blocks,
// and on pixels of the grid without an output.
static bool is_for_amx(const Site* site, const Buffers* buffers) {
  const int64_t *image = buffers->image->dims, *result = buffers->result->dims;
  if (dtype(buffers->image) != dnnl_bf16 || dtype(buffers->result) != dnnl_bf16 || site->config.stride != 1)
    return false;
  bool fills_blocks = image[3] >= BLOCK && result[3] >= BLOCK / 2;
  bool fills_grid = 4 * result[1] * result[2] >= image[1] * image[2];
  return result[2] <= LONGEST_ROW && fills_blocks && fills_grid && has_tiles();
}

// Finds the pixels of the grid from `first` on, in `count` images; `zeros` where there is none. The first pixel of an
// image is `top` rows and `left` columns within the grid.
static void find_pixels(const Grid* grid, int64_t first, int64_t length, const uint16_t* images, int64_t count,
                        const int64_t* shape, int64_t top, int64_t left, const uint16_t* zeros,
                        const uint16_t** pixels) {
  int64_t x = first % grid->width, row = first / grid->width, image = row / grid->height, width = shape[2];
  for (int64_t y = row % grid->height; length > 0; x = 0) {
    int64_t n = grid->width - x < length ? grid->width - x : length, r = y - top, column = x - left;
    bool within = image < count && r >= 0 && r < shape[1];
    const uint16_t* start = images + (within ? (image * shape[1] + r) * width * shape[3] : 0);
    for (int64_t i = 0; i < n; i++) {
      bool valid = within && column + i >= 0 && column + i < width;
      pixels[i] = valid ? start + (column + i) * shape[3] : zeros;
    }
    pixels += n;
    length -= n;
    if (++y == grid->height) y = 0, image++;
  }
}

// Loads channels of two pixels and interleaves them: `low` has the first 16 channels, `high` the next.
static inline void load_pair(const uint16_t* const* pixels, int64_t channel, __mmask32 mask, __m512i* low,
                             __m512i* high) {
  __m512i a = _mm512_maskz_loadu_epi16(mask, pixels[0] + channel);
  __m512i b = _mm512_maskz_loadu_epi16(mask, pixels[1] + channel);
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  *low = _mm512_permutex2var_epi16(a, first, b);
  *high = _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b);
}

static inline __mmask32 mask_of(int64_t channels) {
  return channels >= BLOCK ? 0xffffffff : ((__mmask32)1 << channels) - 1;
}

// Transposes 16 × 16 pairs: row r of the result has the pair r of each x.
static inline void transpose(__m512i x[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 * i + j] has the pairs j, 4 + j, 8 + j and 12 + j of 4 rows.
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i even = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), odd = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    __m512i even2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    __m512i odd2 = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    y[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    y[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    y[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    y[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  memcpy(x, y, sizeof y);
}

// Copies `length` pixels, a multiple of 32, to [C P], whose rows have `row` values.
static void copy_transposed(const uint16_t* const* pixels, int64_t length, int64_t channels, int64_t row,
                            uint16_t* transposed) {
  for (int64_t c = 0; c < channels; c += BLOCK) {
    __mmask32 mask = mask_of(channels - c);
    for (int64_t p = 0; p < length; p += BLOCK) {
      __m512i low[16], high[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) load_pair(pixels + p + 2 * i, c, mask, &low[i], &high[i]);
      transpose(low);
      transpose(high);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        _mm512_storeu_si512(transposed + (c + i) * row + p, low[i]);
        _mm512_storeu_si512(transposed + (c + 16 + i) * row + p, high[i]);
      }
    }
  }
}

// Adds both values of each pair to `sum`.
static inline __m512 add_pairs(__m512 sum, __m512i pairs) {
  __m512i second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000));
  sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
  return _mm512_add_ps(sum, _mm512_castsi512_ps(second));
}

// Copies `length` pixels, a multiple of 32, to panels of 16 channels, [K/16 P/2 16 2], and adds them to `bias`.
static void copy_pairs(const uint16_t* const* pixels, int64_t length, int64_t channels, uint16_t* panels, float* bias) {
  for (int64_t k = 0; k < channels; k += BLOCK, panels += 2 * 16 * length) {
    __mmask32 mask = mask_of(channels - k);
    __m512 sum = _mm512_setzero_ps(), sum2 = _mm512_setzero_ps();
    for (int64_t p = 0; p < length; p += 2) {
      __m512i low, high;
      load_pair(pixels + p, k, mask, &low, &high);
      _mm512_store_si512(panels + 16 * p, low);
      _mm512_store_si512(panels + 16 * (length + p), high);
      if (bias) sum = add_pairs(sum, low), sum2 = add_pairs(sum2, high);
    }
    if (!bias) continue;
    _mm512_mask_storeu_ps(bias + k, mask, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias + k)));
    if (mask >> 16) {
      float* next = bias + k + 16;
      _mm512_mask_storeu_ps(next, mask >> 16, _mm512_add_ps(sum2, _mm512_maskz_loadu_ps(mask >> 16, next)));
    }
  }
}

// Tiles 0 to 3 are sums, 4 and 5 have the rows of `transposed`, 6 and 7 the panels. Tiles of fewer rows take less time.
typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} Tiles;

// Prepares tiles for `rows` rows of `transposed`, at most 32, in two halves. Returns the rows of the first half.
static int64_t set_tiles(int64_t rows) {
  uint8_t half = (rows + 1) / 2, rest = rows > 1 ? rows / 2 : 1;
  Tiles tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {half, half, rest, rest, half, rest, 16, 16}};
  // GCC 12 does not know that tiles are loaded from memory, and may omit or delay the stores.
  __asm__ volatile("" : : "r"(&tiles) : "memory");
  _tile_loadconfig(&tiles);
  return half;
}

// Adds the product of [M P] and [P 32] to `sum`, whose rows have `width` values. The tiles are set for M rows, P is 32
// times `steps`.
static void add_product(const uint16_t* a, int64_t half, int64_t row, const uint16_t* b, int64_t panel, int64_t steps,
                        float* sum, int64_t width) {
  const uint16_t* a2 = a + half * row;
  float* sum2 = sum + half * width;
  _tile_loadd(0, sum, 4 * width);
  _tile_loadd(1, sum + 16, 4 * width);
  _tile_loadd(2, sum2, 4 * width);
  _tile_loadd(3, sum2 + 16, 4 * width);
  for (int64_t i = 0; i < steps; i++, a += BLOCK, a2 += BLOCK, b += 16 * BLOCK) {
    _tile_loadd(4, a, 2 * row);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + panel, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a2, 2 * row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sum, 4 * width);
  _tile_stored(1, sum + 16, 4 * width);
  _tile_stored(2, sum2, 4 * width);
  _tile_stored(3, sum2 + 16, 4 * width);
}

// Computes the gradients of the kernel, [I J C K] with C and K rounded up to 32, and the bias for the images of a part.
static dnnl_status_t amx_kernel_grad(const void* pointer, int64_t part) {
  const Call* call = pointer;
  const Site* site = call->site;
  const Grid grid = make_grid(site);
  int64_t c = site->image_shape[3], k = site->result_shape[3], taps = site->kernel_shape[0] * site->kernel_shape[1];
  int64_t width = grid.k_blocks * BLOCK, plane = grid.c_blocks * BLOCK * width;  // Of `sum`.
  size_t transposed_size = 2 * grid.c_blocks * BLOCK * grid.row, panels_size = 2 * width * CHUNK;
  size_t zeros_size = 2 * BLOCK * (grid.c_blocks > grid.k_blocks ? grid.c_blocks : grid.k_blocks);
  size_t pixels_size = grid.row * sizeof(uint16_t*);
  Workspace* memory = workspace();
  char* space = memory ? reserve(&memory->scratch, transposed_size + panels_size + zeros_size + pixels_size) : NULL;
  if (!space) return dnnl_out_of_memory;
  uint16_t *transposed = (uint16_t*)space, *panels = (uint16_t*)(space += transposed_size);
  uint16_t* zeros = (uint16_t*)(space += panels_size);
  const uint16_t** pixels = (const uint16_t**)(space + zeros_size);
  memset(zeros, 0, zeros_size);
  float* sum = (float*)(call->kernel + part * site->kernel_size);
  float* bias = call->bias ? (float*)(call->bias + part * site->bias_size) : NULL;
  memset(sum, 0, site->kernel_size);
  if (bias) memset(bias, 0, site->bias_size);
  int64_t first = part * site->part_size;
  int64_t count = first + site->part_size < site->length ? site->part_size : site->length - first;
  const uint16_t* images = (const uint16_t*)(call->image + first * site->image_step);
  const uint16_t* results = (const uint16_t*)(call->result + first * site->result_step);
  int64_t end = ((count - 1) * grid.height + site->result_shape[1] - 1) * grid.width + site->result_shape[2];
  for (int64_t from = 0; from < end; from += CHUNK) {
    int64_t length = end - from < CHUNK ? (end - from + BLOCK - 1) / BLOCK * BLOCK : CHUNK;
    int64_t reached = (length + grid.reach + BLOCK - 1) / BLOCK * BLOCK;
    find_pixels(&grid, from, reached, images, count, site->image_shape, site->config.top, site->config.left, zeros,
                pixels);
    copy_transposed(pixels, reached, c, grid.row, transposed);
    find_pixels(&grid, from, length, results, count, site->result_shape, 0, 0, zeros, pixels);
    copy_pairs(pixels, length, k, panels, bias);
    for (int64_t m = 0; m < grid.c_blocks; m++) {
      int64_t half = set_tiles(c - m * BLOCK < BLOCK ? c - m * BLOCK : BLOCK);
      for (int64_t n = 0; n < grid.k_blocks; n++) {
        for (int64_t tap = 0; tap < taps; tap++) {
          int64_t distance = tap / site->kernel_shape[1] * grid.width + tap % site->kernel_shape[1];
          add_product(transposed + m * BLOCK * grid.row + distance, half, grid.row, panels + n * BLOCK * length,
                      16 * length, length / BLOCK, sum + tap * plane + m * BLOCK * width + n * BLOCK, width);
        }
      }
    }
  }
  _tile_release();
  return dnnl_success;
}
#endif
