// The gradient of a kernel on processors with AVX2 but without AVX-512, for which oneDNN's is slow (see BENCHMARKS.md);
// and the choice between it, kernel_grad_amx.c and oneDNN. Included by kernels.c.
//
// In a padded image, the values that a row of the kernel meets are contiguous: [J C]. So each row of the kernel's
// gradient is a matrix product over the pixels of the output: [P J*C]^T · [P K]. Tiles of it stay in registers.

#if defined(__AVX2__) && defined(__FMA__)
#define HAS_AVX2_KERNEL_GRAD
#include <immintrin.h>

#define TILE_ROWS 6      // With 12 sums of 8 columns, the 16 registers are almost full.
#define TILE_COLUMNS 16  // Two vectors.
#define BAND 192         // Pixels per band at most, so that they stay in the cache; a longer row is a band.

// Part of the output: all rows of some images, or some rows of one.
typedef struct {
  int64_t images, rows, pixels;
  int64_t in_rows, in_columns;  // Of the padded images.
} Band;

static Band largest_band(const Site* site) {
  const int64_t* shape = site->result_shape;
  int64_t rows = BAND / shape[2], images;
  if (rows > shape[1]) rows = shape[1];
  if (rows < 1) rows = 1;
  images = rows == shape[1] ? BAND / (rows * shape[2]) : 1;
  if (images < 1) images = 1;
  return (Band){images, rows, images * rows * shape[2], (rows - 1) * site->config.stride + site->kernel_shape[0],
                (shape[2] - 1) * site->config.stride + site->kernel_shape[1]};
}

// Returns whether `avx2_kernel_grad` can compute this gradient, and fills its tiles.
static bool is_for_avx2(const Buffers* buffers) {
  unsigned isa = dnnl_get_effective_cpu_isa(), avx2 = dnnl_cpu_isa_avx2, avx512 = dnnl_cpu_isa_avx512_core;
  bool float32 = dtype(buffers->image) == dnnl_f32 && dtype(buffers->result) == dnnl_f32;
  bool fills_tile = buffers->kernel->dims[1] * buffers->kernel->dims[2] >= TILE_ROWS;
  return float32 && fills_tile && (isa & avx2) == avx2 && (isa & avx512) != avx512;
}

// Adds the product of [n 6]^T and [n 16] to `sum`: row r, column k is the sum of x[offset[p] + r] * g[16 * p + k] over
// p. Only the last `rows` rows and the first `columns` columns are added.
static void add_tile(int64_t n, const float* restrict x, const int32_t* restrict offset, const float* restrict g,
                     float* restrict sum, int64_t width, int64_t rows, int64_t columns) {
  __m256 sums[TILE_ROWS][2];
  float tile[TILE_ROWS][TILE_COLUMNS];
#pragma GCC unroll 6
  for (int r = 0; r < TILE_ROWS; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (int64_t p = 0; p < n; p++) {
    const float* pixel = x + offset[p];
    __m256 left = _mm256_load_ps(g + TILE_COLUMNS * p), right = _mm256_load_ps(g + TILE_COLUMNS * p + 8);
#pragma GCC unroll 6
    for (int r = 0; r < TILE_ROWS; r++) {
      __m256 value = _mm256_broadcast_ss(pixel + r);
      sums[r][0] = _mm256_fmadd_ps(value, left, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(value, right, sums[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < TILE_ROWS; r++) {
    _mm256_storeu_ps(tile[r], sums[r][0]);
    _mm256_storeu_ps(tile[r] + 8, sums[r][1]);
  }
  for (int64_t r = TILE_ROWS - rows; r < TILE_ROWS; r++)
    for (int64_t k = 0; k < columns; k++) sum[r * width + k] += tile[r][k];
}

// Copies rows of the images into the padded images, whose padding is 0.
static void copy_rows(const Site* site, const Band* band, const float* x, int64_t first_row, float* padded) {
  int64_t h = site->image_shape[1], w = site->image_shape[2], c = site->image_shape[3];
  int64_t width = band->in_columns - site->config.left < w ? band->in_columns - site->config.left : w;
  for (int64_t image = 0; image < band->images; image++) {
    for (int64_t row = 0; row < band->in_rows; row++) {
      float* to = padded + ((image * band->in_rows + row) * band->in_columns) * c;
      int64_t from = first_row * site->config.stride + row - site->config.top;
      if (from < 0 || from >= h)
        memset(to, 0, band->in_columns * c * sizeof(float));
      else
        memcpy(to + site->config.left * c, x + (image * h + from) * w * c, width * c * sizeof(float));
    }
  }
}

// Copies [P K] to panels of 16 columns, [K/16 P 16], and adds the sums of the columns to `bias`.
static void copy_panels(int64_t pixels, int64_t k, const float* g, float* panels, float* bias) {
  for (int64_t first = 0; first < k; first += TILE_COLUMNS, panels += pixels * TILE_COLUMNS) {
    int64_t columns = k - first < TILE_COLUMNS ? k - first : TILE_COLUMNS;
    float sums[TILE_COLUMNS] = {0};
    if (columns < TILE_COLUMNS) memset(panels, 0, pixels * TILE_COLUMNS * sizeof(float));
    for (int64_t p = 0; p < pixels; p++) {
      memcpy(panels + p * TILE_COLUMNS, g + p * k + first, columns * sizeof(float));
      for (int64_t i = 0; i < TILE_COLUMNS; i++) sums[i] += panels[p * TILE_COLUMNS + i];
    }
    for (int64_t i = 0; bias && i < columns; i++) bias[first + i] += sums[i];
  }
}

// Computes the gradients of the kernel, [I J C K], and the bias for the images of a part.
static dnnl_status_t avx2_kernel_grad(const void* pointer, int64_t part) {
  const Call* call = pointer;
  const Site* site = call->site;
  const Band whole = largest_band(site);
  int64_t c = site->image_shape[3], k = site->result_shape[3], h2 = site->result_shape[1], w2 = site->result_shape[2];
  int64_t panels = (k + TILE_COLUMNS - 1) / TILE_COLUMNS, height = site->kernel_shape[1] * c;
  size_t padded_size = whole.images * whole.in_rows * whole.in_columns * c * sizeof(float);
  size_t panels_size = panels * whole.pixels * TILE_COLUMNS * sizeof(float);
  padded_size = (padded_size + 63) / 64 * 64;
  Workspace* memory = workspace();
  char* space = memory ? reserve(&memory->scratch, padded_size + panels_size + whole.pixels * sizeof(int32_t)) : NULL;
  if (!space) return dnnl_out_of_memory;
  float *padded = (float*)space, *packed = (float*)(space + padded_size);
  int32_t* offset = (int32_t*)(space + padded_size + panels_size);
  float* sum = (float*)(call->kernel + part * site->kernel_size);
  float* bias = call->bias ? (float*)(call->bias + part * site->bias_size) : NULL;
  memset(padded, 0, padded_size);
  memset(sum, 0, site->kernel_size);
  if (bias) memset(bias, 0, site->bias_size);
  for (int64_t p = 0; p < whole.pixels; p++) {
    int64_t row = p / w2 % whole.rows, image = p / w2 / whole.rows;
    offset[p] =
        ((image * whole.in_rows + row * site->config.stride) * whole.in_columns + p % w2 * site->config.stride) * c;
  }
  int64_t first = part * site->part_size;
  int64_t last = first + site->part_size < site->length ? first + site->part_size : site->length;
  for (int64_t image = first; image < last; image += whole.images) {
    for (int64_t row = 0; row < h2; row += whole.rows) {
      Band band = whole;
      if (last - image < band.images) band.images = last - image;
      if (h2 - row < band.rows) band.rows = h2 - row;
      band.pixels = band.images * band.rows * w2;
      copy_rows(site, &band, (const float*)(call->image + image * site->image_step), row, padded);
      const float* g = (const float*)(call->result + image * site->result_step) + row * w2 * k;
      copy_panels(band.pixels, k, g, packed, bias);
      for (int64_t i = 0; i < site->kernel_shape[0]; i++) {
        for (int64_t r = 0; r < height; r += TILE_ROWS) {
          int64_t rows = height - r < TILE_ROWS ? height - r : TILE_ROWS, start = r + rows - TILE_ROWS;
          for (int64_t panel = 0; panel < panels; panel++) {
            int64_t column = panel * TILE_COLUMNS, columns = k - column < TILE_COLUMNS ? k - column : TILE_COLUMNS;
            add_tile(band.pixels, padded + i * band.in_columns * c + start, offset, packed + column * band.pixels,
                     sum + (i * height + start) * k + column, k, rows, columns);
          }
        }
      }
    }
  }
  return dnnl_success;
}
#endif

#include "kernel_grad_amx.c"

// Returns whether the shapes and the padding agree. Otherwise oneDNN says what is wrong with them.
static bool shapes_agree(const Site* site, const Buffers* buffers) {
  const int64_t *image = buffers->image->dims, *kernel = buffers->kernel->dims, *result = buffers->result->dims;
  const int64_t padding[] = {site->config.top, site->config.bottom, site->config.left, site->config.right};
  for (int i = 0; i < 2; i++) {
    int64_t low = padding[2 * i], high = padding[2 * i + 1], rest = image[i + 1] + low + high - kernel[i];
    if (low < 0 || high < 0 || low >= kernel[i] || high >= kernel[i] || rest < 0) return false;
    if (result[i + 1] != rest / site->config.stride + 1) return false;
  }
  return result[0] == image[0] && kernel[2] == image[3] && kernel[3] == result[3];
}

// Returns the function that computes the gradient of a kernel; NULL if it is oneDNN's. It computes sums of the shape
// [I J C K] for each part of the batch, with C and K rounded up to `multiple`.
static Work* find_kernel_grad(const Site* site, const Buffers* buffers, int64_t* multiple) {
  *multiple = 1;
  if (site->config.kind != KERNEL_GRAD || site->config.groups != 1 || !shapes_agree(site, buffers)) return NULL;
#ifdef HAS_AMX_KERNEL_GRAD
  if (is_for_amx(site, buffers)) {
    *multiple = BLOCK;
    return amx_kernel_grad;
  }
#endif
#ifdef HAS_AVX2_KERNEL_GRAD
  if (is_for_avx2(buffers)) return avx2_kernel_grad;
#endif
  return NULL;
}
