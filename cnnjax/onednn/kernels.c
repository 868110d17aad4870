// Calls oneDNN from XLA: handlers of XLA's foreign function interface (xla/ffi/api/c_api.h of jaxlib).
//
// Each call site of a compiled program has a `Site`, which XLA creates and destroys with the program. Its primitives
// are created at its first execution, from the shapes of the buffers.
//
// oneDNN would start OpenMP threads, which compete with XLA's. Instead, a batch is divided into parts, each is computed
// on one thread, and XLA's own pool provides the threads. A batch has at least 8 parts, so on up to 8 threads the order
// of summation, and the bits, are the same.
//
// Each thread keeps its largest workspace: for the gradient of a kernel, a copy of the kernel for each part.

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "oneapi/dnnl/dnnl.h"
#include "xla/ffi/api/c_api.h"

// Of the OpenMP library that oneDNN uses; omp.h is the compiler's, and clang may have none.
extern void omp_set_num_threads(int);  // Of the calling thread.
extern int omp_get_max_threads(void);

#define MIN_PARTS 8
#define MAX_COPIES (256 << 20)  // Bytes of the copies of a kernel.
#define SPINS 2000              // 49 microseconds on an AMD EPYC.
#define MAX_ARGUMENTS 5
#define TRY(expression)                          \
  do {                                           \
    dnnl_status_t status_ = (expression);        \
    if (status_ != dnnl_success) return status_; \
  } while (0)

static dnnl_engine_t engine;
static dnnl_stream_t stream;  // Shared by all threads: on a CPU it has no state.

// --- Memory of each thread, kept for the next call ------------------------------------------------------------------

typedef struct {
  void* data;
  size_t size;
} Block;

typedef struct {
  Block kernel, scratch;
} Workspace;

static pthread_key_t workspace_key;

static void free_workspace(void* pointer) {
  Workspace* workspace = pointer;
  free(workspace->kernel.data);
  free(workspace->scratch.data);
  free(workspace);
}

static Workspace* workspace(void) {
  Workspace* found = pthread_getspecific(workspace_key);
  if (!found && (found = calloc(1, sizeof *found)) && pthread_setspecific(workspace_key, found)) {
    free(found);
    found = NULL;
  }
  return found;
}

// Returns at least `size` bytes, or NULL. The next call may overwrite them.
static void* reserve(Block* block, size_t size) {
  if (block->size < size) {
    free(block->data);
    block->size = 0;
    if (posix_memalign(&block->data, 64, size)) return block->data = NULL;  // Cache lines.
    block->size = size;
  }
  return block->data;
}

// --- Parts of a call, on XLA's threads ------------------------------------------------------------------------------

typedef dnnl_status_t Work(const void* call, int64_t part);

typedef struct {
  Work* work;
  const void* call;
  int64_t count;
  atomic_llong next, finished;
  atomic_int status;
  atomic_int references;  // A helper may start after all parts are finished.
  sem_t all_finished;
} Job;

static void release(Job* job) {
  if (atomic_fetch_sub(&job->references, 1) > 1) return;
  sem_destroy(&job->all_finished);
  free(job);
}

static void work_on(Job* job) {
  for (int64_t part; (part = atomic_fetch_add(&job->next, 1)) < job->count;) {
    dnnl_status_t status = job->work(job->call, part);
    if (status != dnnl_success) atomic_store(&job->status, status);
    if (atomic_fetch_add(&job->finished, 1) + 1 == job->count) sem_post(&job->all_finished);
  }
}

static void help(void* job) {
  int threads = omp_get_max_threads();
  omp_set_num_threads(1);  // The calling thread did so, too.
  work_on(job);
  omp_set_num_threads(threads);
  release(job);
}

// Returns whether there was an error, and destroys it.
static bool failed(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  if (!error) return false;
  XLA_FFI_Error_Destroy_Args args = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
  api->XLA_FFI_Error_Destroy(&args);
  return true;
}

static int64_t num_threads(const XLA_FFI_CallFrame* frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, .ctx = frame->ctx, .num_threads = &threads};
  return failed(frame->api, frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? 1 : threads;
}

// Calls `work` for each part. The calling thread takes part, then waits only for parts that others have started.
static dnnl_status_t in_parts(const XLA_FFI_CallFrame* frame, int64_t count, Work* work, const void* call) {
  int64_t threads = num_threads(frame), helpers = (threads < count ? threads : count) - 1;
  Job* job = malloc(sizeof *job);
  if (!job) return dnnl_out_of_memory;
  *job = (Job){.work = work, .call = call, .count = count, .references = (int)helpers + 1};
  sem_init(&job->all_finished, 0, 0);  // 0 is valid, so it succeeds.
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {
        .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, .ctx = frame->ctx, .task = help, .data = job};
    if (failed(frame->api, frame->api->XLA_FFI_ThreadPool_Schedule(&args))) release(job);
  }
  work_on(job);
  bool finished = false;
  for (int i = 0; i < SPINS && !finished; i++) {
    finished = sem_trywait(&job->all_finished) == 0;
    if (!finished) __builtin_ia32_pause();
  }
  while (!finished) finished = sem_wait(&job->all_finished) == 0;  // A signal may interrupt it.
  dnnl_status_t status = atomic_load(&job->status);
  release(job);
  return status;
}

// --- What a call site keeps -----------------------------------------------------------------------------------------

enum { FORWARD, IMAGE_GRAD, KERNEL_GRAD, MATMUL };

// The primitive of one part.
typedef struct {
  dnnl_primitive_t primitive;
  dnnl_primitive_desc_t desc;
  dnnl_memory_desc_t image, kernel, result;  // Of a matmul: a, b and their product. A convolution has no `kernel`.
  // Of a convolution: the layout of its kernel that oneDNN prefers, which depends on the number of images, owned by
  // `desc`; and the reorder between it and the layout of the program, NULL if the first part has the same.
  const_dnnl_memory_desc_t inner_kernel;
  dnnl_primitive_t reorder;
  const_dnnl_memory_desc_t scratch;
  size_t scratch_size;
} Part;

typedef struct {
  struct {  // In the order of calls.py.
    int64_t kind, stride, groups, top, bottom, left, right, relu, transpose_a, transpose_b;
  } config;
  pthread_mutex_t lock;
  bool ready;
  bool by_columns;                              // Whether a product is divided into columns, or rows.
  int64_t length, part_size, num_parts, rest;   // `length`: the number of images, columns or rows.
  Part parts[2];                                // Of `part_size`, and of the `rest`.
  size_t image_step, kernel_step, result_step;  // Bytes from one image, row or column to the next.
  // Of a convolution:
  dnnl_memory_desc_t outer_kernel, bias;  // [I J C K] of the program.
  size_t kernel_size, bias_size;          // Bytes of each copy of a kernel, and of its bias.
  Work* kernel_grad;                      // A function of kernel_grad.c, or NULL: the gradient is oneDNN's.
  int64_t image_shape[4], kernel_shape[4], result_shape[4], sum_shape[4];
} Site;

typedef struct {
  const XLA_FFI_Buffer *image, *kernel, *bias, *result;  // Or their gradients, which have the same shapes.
} Buffers;

// Pointers of one call. A kernel's gradient has a kernel and a bias for each part.
typedef struct {
  const Site* site;
  char *image, *kernel, *bias, *result;
} Call;

static dnnl_data_type_t dtype(const XLA_FFI_Buffer* buffer) {
  return buffer->dtype == XLA_FFI_DataType_BF16 ? dnnl_bf16 : dnnl_f32;
}

static size_t bytes(const XLA_FFI_Buffer* buffer) { return dtype(buffer) == dnnl_bf16 ? 2 : 4; }

static size_t bytes_per_image(const XLA_FFI_Buffer* buffer) {
  return buffer->dims[1] * buffer->dims[2] * buffer->dims[3] * bytes(buffer);
}

#include "kernel_grad.c"

// Describes `batch` images of a buffer [B H W C].
static dnnl_status_t describe_images(dnnl_memory_desc_t* desc, const XLA_FFI_Buffer* buffer, int64_t batch) {
  int64_t h = buffer->dims[1], w = buffer->dims[2], c = buffer->dims[3];
  dnnl_dims_t dims = {batch, c, h, w}, strides = {h * w * c, 1, w * c, c};
  return dnnl_memory_desc_create_with_strides(desc, 4, dims, dtype(buffer), strides);
}

// Describes a kernel of the shape of `buffer`, [I J C/G K]: in its own layout, or in any if `type` is given.
static dnnl_status_t describe_kernel(dnnl_memory_desc_t* desc, const XLA_FFI_Buffer* buffer, int64_t groups,
                                     dnnl_data_type_t type) {
  int64_t i = buffer->dims[0], j = buffer->dims[1], c = buffer->dims[2], k = buffer->dims[3];
  dnnl_dims_t dims = {groups, k / groups, c, i, j}, strides = {k / groups, 1, k, j * c * k, c * k};
  int skip = groups == 1;  // oneDNN has faster kernels without the dimension of groups.
  if (type) return dnnl_memory_desc_create_with_tag(desc, 5 - skip, dims + skip, type, dnnl_format_tag_any);
  return dnnl_memory_desc_create_with_strides(desc, 5 - skip, dims + skip, dtype(buffer), strides + skip);
}

static dnnl_status_t set_relu(dnnl_primitive_attr_t attr) {
  dnnl_post_ops_t ops;
  TRY(dnnl_post_ops_create(&ops));
  dnnl_status_t status = dnnl_post_ops_append_eltwise(ops, dnnl_eltwise_relu, 0, 0);
  if (status == dnnl_success) status = dnnl_primitive_attr_set_post_ops(attr, ops);
  dnnl_post_ops_destroy(ops);
  return status;
}

static dnnl_status_t create_desc(const Site* site, Part* part, const_dnnl_memory_desc_t kernel,
                                 const_dnnl_memory_desc_t forward_kernel, const_dnnl_primitive_attr_t attr) {
  int64_t stride = site->config.stride, kind = site->config.kind;
  dnnl_dims_t strides = {stride, stride}, dilates = {0, 0};
  dnnl_dims_t low = {site->config.top, site->config.left}, high = {site->config.bottom, site->config.right};
  dnnl_primitive_desc_t forward;
  TRY(dnnl_convolution_forward_primitive_desc_create(&forward, engine, dnnl_forward_training, dnnl_convolution_direct,
                                                     part->image, forward_kernel, kind == FORWARD ? site->bias : NULL,
                                                     part->result, strides, dilates, low, high, attr));
  if (kind == FORWARD) {
    part->desc = forward;
    return dnnl_success;
  }
  dnnl_status_t status = kind == IMAGE_GRAD ? dnnl_convolution_backward_data_primitive_desc_create(
                                                  &part->desc, engine, dnnl_convolution_direct, part->image, kernel,
                                                  part->result, strides, dilates, low, high, forward, attr)
                                            : dnnl_convolution_backward_weights_primitive_desc_create(
                                                  &part->desc, engine, dnnl_convolution_direct, part->image, kernel,
                                                  site->bias, part->result, strides, dilates, low, high, forward, attr);
  dnnl_primitive_desc_destroy(forward);
  return status;
}

// Creates the primitive of `part`, whose descriptor exists.
static dnnl_status_t create_primitive(Part* part) {
  part->scratch = dnnl_primitive_desc_query_md(part->desc, dnnl_query_scratchpad_md, 0);
  part->scratch_size = dnnl_memory_desc_get_size(part->scratch);
  return dnnl_primitive_create(&part->primitive, part->desc);
}

static dnnl_status_t create_part(Site* site, Part* part, const Buffers* buffers, int64_t batch) {
  int64_t groups = site->config.groups, kind = site->config.kind;
  dnnl_memory_desc_t forward_kernel = NULL, any = NULL;
  dnnl_primitive_attr_t attr = NULL;
  TRY(describe_images(&part->image, buffers->image, batch));
  TRY(describe_images(&part->result, buffers->result, batch));
  dnnl_status_t status = dnnl_primitive_attr_create(&attr);
  if (!status) status = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
  if (!status && site->config.relu) status = set_relu(attr);
  if (!status) status = describe_kernel(&forward_kernel, buffers->kernel, groups, dtype(buffers->image));
  if (!status)
    status = describe_kernel(&any, buffers->kernel, groups, kind == KERNEL_GRAD ? dnnl_f32 : dtype(buffers->image));
  if (!status) {  // All gradients of a kernel have one layout, because they are added.
    const_dnnl_memory_desc_t first = site->parts[0].inner_kernel, kernel = kind == KERNEL_GRAD && first ? first : any;
    status = create_desc(site, part, kernel, kind == FORWARD ? kernel : forward_kernel, attr);
  }
  dnnl_memory_desc_destroy(forward_kernel);
  dnnl_memory_desc_destroy(any);
  dnnl_primitive_attr_destroy(attr);
  TRY(status);
  dnnl_query_t query = kind == KERNEL_GRAD ? dnnl_query_diff_weights_md : dnnl_query_weights_md;
  part->inner_kernel = dnnl_primitive_desc_query_md(part->desc, query, 0);
  size_t size = (dnnl_memory_desc_get_size(part->inner_kernel) + 63) / 64 * 64;  // So that each copy is aligned.
  if (site->kernel_size < size) site->kernel_size = size;
  return create_primitive(part);
}

static dnnl_status_t create_reorder(dnnl_primitive_t* primitive, const_dnnl_memory_desc_t from,
                                    const_dnnl_memory_desc_t to) {
  dnnl_primitive_desc_t desc;
  TRY(dnnl_reorder_primitive_desc_create(&desc, from, engine, to, engine, NULL));
  dnnl_status_t status = dnnl_primitive_create(primitive, desc);
  dnnl_primitive_desc_destroy(desc);
  return status;
}

static dnnl_status_t create_convolution(Site* site, const Buffers* buffers) {
  bool out = site->config.kind == KERNEL_GRAD;
  site->image_step = bytes_per_image(buffers->image);
  site->result_step = bytes_per_image(buffers->result);
  if (buffers->bias) {
    dnnl_dims_t dims = {buffers->bias->dims[0]}, strides = {1};
    TRY(dnnl_memory_desc_create_with_strides(&site->bias, 1, dims, dtype(buffers->bias), strides));
    site->bias_size = dnnl_memory_desc_get_size(site->bias);
  }
  if (site->kernel_grad) return dnnl_success;
  site->kernel_size = 0;
  Part *first = &site->parts[0], *second = &site->parts[1];
  TRY(create_part(site, first, buffers, site->part_size));
  TRY(describe_kernel(&site->outer_kernel, buffers->kernel, site->config.groups, dnnl_data_type_undef));
  TRY(create_reorder(&first->reorder, out ? first->inner_kernel : site->outer_kernel,
                     out ? site->outer_kernel : first->inner_kernel));
  if (site->rest == site->part_size) return dnnl_success;
  TRY(create_part(site, second, buffers, site->rest));
  if (dnnl_memory_desc_equal(second->inner_kernel, first->inner_kernel)) return dnnl_success;
  return create_reorder(&second->reorder, site->outer_kernel, second->inner_kernel);
}

// Describes m × n values of a matrix that has `rows` rows and `columns` columns, or as many columns and rows if it is
// stored transposed.
static dnnl_status_t describe_matrix(dnnl_memory_desc_t* desc, const XLA_FFI_Buffer* buffer, bool transposed, int64_t m,
                                     int64_t n) {
  int64_t width = buffer->dims[1];
  dnnl_dims_t dims = {m, n}, strides = {transposed ? 1 : width, transposed ? width : 1};
  return dnnl_memory_desc_create_with_strides(desc, 2, dims, dtype(buffer), strides);
}

// Creates a product of [m k] and [k n].
static dnnl_status_t create_product(Site* site, Part* part, const Buffers* buffers, int64_t m, int64_t n) {
  int64_t k = buffers->image->dims[!site->config.transpose_a];
  dnnl_primitive_attr_t attr;
  TRY(describe_matrix(&part->image, buffers->image, site->config.transpose_a, m, k));
  TRY(describe_matrix(&part->kernel, buffers->kernel, site->config.transpose_b, k, n));
  TRY(describe_matrix(&part->result, buffers->result, false, m, n));
  TRY(dnnl_primitive_attr_create(&attr));
  dnnl_status_t status = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
  if (!status)
    status =
        dnnl_matmul_primitive_desc_create(&part->desc, engine, part->image, part->kernel, NULL, part->result, attr);
  dnnl_primitive_attr_destroy(attr);
  return status ? status : create_primitive(part);
}

static dnnl_status_t create_matmul(Site* site, const Buffers* buffers) {
  bool a = site->config.transpose_a, b = site->config.transpose_b;
  const int64_t* shape = buffers->result->dims;
  if (site->by_columns)
    site->kernel_step = (b ? buffers->kernel->dims[1] : 1) * bytes(buffers->kernel);
  else
    site->image_step = (a ? 1 : buffers->image->dims[1]) * bytes(buffers->image);
  site->result_step = (site->by_columns ? 1 : shape[1]) * bytes(buffers->result);
  for (int i = 0; i < (site->rest == site->part_size ? 1 : 2); i++) {
    int64_t size = i ? site->rest : site->part_size;
    TRY(create_product(site, &site->parts[i], buffers, site->by_columns ? shape[0] : size,
                       site->by_columns ? size : shape[1]));
  }
  return dnnl_success;
}

// Chooses who computes the gradient of a kernel, and the size of a part's sums.
static void choose_kernel_grad(Site* site, const Buffers* buffers) {
  int64_t multiple;
  site->kernel_grad = find_kernel_grad(site, buffers, &multiple);
  memcpy(site->image_shape, buffers->image->dims, sizeof site->image_shape);
  memcpy(site->kernel_shape, buffers->kernel->dims, sizeof site->kernel_shape);
  memcpy(site->result_shape, buffers->result->dims, sizeof site->result_shape);
  site->kernel_size = sizeof(float);
  for (int i = 0; i < 4; i++) {
    int64_t unit = i < 2 ? 1 : multiple;
    site->sum_shape[i] = (site->kernel_shape[i] + unit - 1) / unit * unit;
    site->kernel_size *= site->sum_shape[i];
  }
}

static dnnl_status_t create(Site* site, const Buffers* buffers, int64_t threads) {
  int64_t parts = threads > MIN_PARTS ? threads : MIN_PARTS, multiple = 1;
  site->length = buffers->image->dims[0];
  if (site->config.kind == MATMUL) {
    const int64_t* shape = buffers->result->dims;
    site->by_columns = shape[1] >= shape[0];
    site->length = shape[site->by_columns];
    multiple = 16;  // Values of a vector register.
  }
  if (site->config.kind == KERNEL_GRAD) {
    choose_kernel_grad(site, buffers);
    int64_t size = site->kernel_size, most = size > MAX_COPIES ? 1 : MAX_COPIES / size;
    if (parts > most) parts = most;
  }
  if (site->length < 1) return dnnl_invalid_arguments;
  site->part_size = (site->length + parts * multiple - 1) / (parts * multiple) * multiple;
  if (site->part_size > site->length) site->part_size = site->length;
  site->num_parts = (site->length + site->part_size - 1) / site->part_size;
  site->rest = site->length - (site->num_parts - 1) * site->part_size;
  return site->config.kind == MATMUL ? create_matmul(site, buffers) : create_convolution(site, buffers);
}

static void destroy_contents(Site* site) {
  for (int i = 0; i < 2; i++) {
    Part* part = &site->parts[i];
    dnnl_primitive_destroy(part->primitive);
    dnnl_primitive_desc_destroy(part->desc);
    dnnl_memory_desc_destroy(part->image);
    dnnl_memory_desc_destroy(part->kernel);
    dnnl_memory_desc_destroy(part->result);
    dnnl_primitive_destroy(part->reorder);
    *part = (Part){0};
  }
  dnnl_memory_desc_destroy(site->outer_kernel);
  dnnl_memory_desc_destroy(site->bias);
  site->outer_kernel = site->bias = NULL;
}

static void destroy(void* pointer) {
  Site* site = pointer;
  destroy_contents(site);
  pthread_mutex_destroy(&site->lock);
  free(site);
}

typedef struct {
  int id;
  const_dnnl_memory_desc_t desc;
  void* data;
} Argument;

// Executes a primitive on the arguments that are not NULL.
static dnnl_status_t execute(dnnl_primitive_t primitive, int count, const Argument* arguments) {
  dnnl_exec_arg_t args[MAX_ARGUMENTS];
  int used = 0;
  dnnl_status_t status = dnnl_success;
  for (int i = 0; i < count && status == dnnl_success; i++) {
    if (!arguments[i].data) continue;
    args[used].arg = arguments[i].id;
    status = dnnl_memory_create(&args[used].memory, arguments[i].desc, engine, arguments[i].data);
    used += status == dnnl_success;
  }
  if (status == dnnl_success) status = dnnl_primitive_execute(primitive, stream, used, args);
  while (used > 0) dnnl_memory_destroy(args[--used].memory);
  return status;
}

static dnnl_status_t reorder(dnnl_primitive_t primitive, const_dnnl_memory_desc_t from, void* in,
                             const_dnnl_memory_desc_t to, void* out) {
  Argument arguments[] = {{DNNL_ARG_FROM, from, in}, {DNNL_ARG_TO, to, out}};
  return execute(primitive, 2, arguments);
}

static dnnl_status_t compute_part(const void* pointer, int64_t i) {
  const Call* call = pointer;
  const Site* site = call->site;
  const Part* part = &site->parts[(i + 1) * site->part_size > site->length];
  int64_t kind = site->config.kind, first = i * site->part_size, own = kind == KERNEL_GRAD ? i : 0;
  int64_t copy = part == &site->parts[1] && part->reorder ? 1 : own;
  bool forward = kind == FORWARD || kind == MATMUL;
  Workspace* space = workspace();
  void* scratch = space && part->scratch_size ? reserve(&space->scratch, part->scratch_size) : NULL;
  if (!space || (part->scratch_size && !scratch)) return dnnl_out_of_memory;
  // oneDNN 3.2 reads bfloat16 scratch memory that it never wrote, if the stride is larger than the image.
  if (scratch && kind == KERNEL_GRAD && site->config.stride > 1) memset(scratch, 0, part->scratch_size);
  Argument arguments[MAX_ARGUMENTS] = {
      {kind == IMAGE_GRAD ? DNNL_ARG_DIFF_SRC : DNNL_ARG_SRC, part->image, call->image + first * site->image_step},
      {forward ? DNNL_ARG_DST : DNNL_ARG_DIFF_DST, part->result, call->result + first * site->result_step},
      {kind == KERNEL_GRAD ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_WEIGHTS, part->kernel ? part->kernel : part->inner_kernel,
       call->kernel + first * site->kernel_step + copy * site->kernel_size},
      {forward ? DNNL_ARG_BIAS : DNNL_ARG_DIFF_BIAS, site->bias,
       call->bias ? call->bias + own * site->bias_size : NULL},
      {DNNL_ARG_SCRATCHPAD, part->scratch, scratch},
  };
  return execute(part->primitive, MAX_ARGUMENTS, arguments);
}

#define NUM_RANGES 8

// Adds a range of the gradients of all parts to that of the first part.
static dnnl_status_t add_range(const void* pointer, int64_t range) {
  const Call* call = pointer;
  const Site* site = call->site;
  size_t size = site->kernel_size / sizeof(float);
  size_t first = size * range / NUM_RANGES, last = size * (range + 1) / NUM_RANGES;
  float* restrict sum = (float*)call->kernel;
  for (int64_t part = 1; part < site->num_parts; part++) {
    const float* restrict other = (const float*)(call->kernel + part * site->kernel_size);
    for (size_t i = first; i < last; i++) sum[i] += other[i];
  }
  return dnnl_success;
}

// Copies the sum of all parts, without the channels that only fill blocks.
static void copy_sum(const Site* site, const float* sum, float* kernel) {
  const int64_t *shape = site->kernel_shape, *from = site->sum_shape;
  for (int64_t tap = 0; tap < shape[0] * shape[1]; tap++)
    for (int64_t c = 0; c < shape[2]; c++)
      memcpy(kernel + (tap * shape[2] + c) * shape[3], sum + (tap * from[2] + c) * from[3], shape[3] * sizeof(float));
}

static dnnl_status_t compute(const XLA_FFI_CallFrame* frame, const Site* site, const Buffers* buffers) {
  if (site->config.kind == MATMUL) {
    Call call = {site, buffers->image->data, buffers->kernel->data, NULL, buffers->result->data};
    return in_parts(frame, site->num_parts, compute_part, &call);
  }
  const Part *first = &site->parts[0], *second = &site->parts[1];
  int64_t kind = site->config.kind, copies = kind == KERNEL_GRAD ? site->num_parts : second->reorder ? 2 : 1;
  size_t biases = kind == KERNEL_GRAD ? copies * site->bias_size : 0;
  Workspace* space = workspace();
  char* kernel = space ? reserve(&space->kernel, copies * site->kernel_size + biases) : NULL;
  if (!kernel) return dnnl_out_of_memory;
  Call call = {site, buffers->image->data, kernel, buffers->bias ? buffers->bias->data : NULL, buffers->result->data};
  if (kind != KERNEL_GRAD) {
    void* outer = buffers->kernel->data;
    TRY(reorder(first->reorder, site->outer_kernel, outer, first->inner_kernel, kernel));
    if (second->reorder)
      TRY(reorder(second->reorder, site->outer_kernel, outer, second->inner_kernel, kernel + site->kernel_size));
    return in_parts(frame, site->num_parts, compute_part, &call);
  }
  if (buffers->bias) call.bias = kernel + copies * site->kernel_size;
  TRY(in_parts(frame, site->num_parts, site->kernel_grad ? site->kernel_grad : compute_part, &call));
  TRY(in_parts(frame, NUM_RANGES, add_range, &call));
  if (buffers->bias) {
    float* sum = buffers->bias->data;
    memset(sum, 0, site->bias_size);
    for (int64_t part = 0; part < copies; part++)
      for (int64_t i = 0; i < buffers->bias->dims[0]; i++) sum[i] += ((float*)(call.bias + part * site->bias_size))[i];
  }
  if (!site->kernel_grad)
    return reorder(first->reorder, first->inner_kernel, kernel, site->outer_kernel, buffers->kernel->data);
  copy_sum(site, (float*)kernel, buffers->kernel->data);
  return dnnl_success;
}

// --- Handlers -------------------------------------------------------------------------------------------------------

XLA_FFI_TypeId cnnjax_type_id;  // XLA sets it.
XLA_FFI_TypeInfo cnnjax_type_info = {.struct_size = XLA_FFI_TypeInfo_STRUCT_SIZE, .deleter = destroy};

// Tells XLA the version of the interface, if that is what the frame asks for. Returns whether it did.
static bool answers_metadata(const XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)frame->extension_start)->metadata;
  metadata->api_version = (XLA_FFI_Api_Version){.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE,
                                                .major_version = XLA_FFI_API_MAJOR,
                                                .minor_version = XLA_FFI_API_MINOR};
  metadata->state_type_id = cnnjax_type_id;
  return true;
}

static XLA_FFI_Error* new_error(const XLA_FFI_Api* api, XLA_FFI_Error_Code code, const char* message) {
  XLA_FFI_Error_Create_Args args = {
      .struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE, .message = message, .errc = code};
  return api->XLA_FFI_Error_Create(&args);
}

// Writes the shape of a buffer, such as [2 3].
static void write_shape(char* text, size_t size, const XLA_FFI_Buffer* buffer) {
  size_t used = snprintf(text, size, "[");
  for (int64_t i = 0; i < buffer->rank && used < size; i++)
    used += snprintf(text + used, size - used, "%s%lld", i ? " " : "", (long long)buffer->dims[i]);
  if (used < size) snprintf(text + used, size - used, "]");
}

static XLA_FFI_Error* error_of(const XLA_FFI_Api* api, dnnl_status_t status, const Site* site, const Buffers* buffers) {
  static const char* const kinds[] = {"a convolution", "the gradient of an image", "the gradient of a kernel",
                                      "a product"};
  const char* reason = status == dnnl_out_of_memory       ? "out of memory"
                       : status == dnnl_unimplemented     ? "not implemented"
                       : status == dnnl_invalid_arguments ? "invalid arguments"
                                                          : "runtime error";
  char message[512], image[100], kernel[100];
  write_shape(image, sizeof image, buffers->image);
  write_shape(kernel, sizeof kernel, buffers->kernel);
  snprintf(message, sizeof message,
           "oneDNN failed to compute %s (status %d: %s), shapes %s and %s. Set CNNJAX_ONEDNN=0 to use XLA's kernels.",
           kinds[site->config.kind], status, reason, image, kernel);
  bool memory = status == dnnl_out_of_memory;
  return new_error(api, memory ? XLA_FFI_Error_Code_RESOURCE_EXHAUSTED : XLA_FFI_Error_Code_INTERNAL, message);
}

// Creates the state of a call site. Its only attribute is `config`.
XLA_FFI_Error* cnnjax_instantiate(XLA_FFI_CallFrame* frame) {
  if (answers_metadata(frame)) return NULL;
  Site* site = calloc(1, sizeof *site);
  if (!site) return new_error(frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "Out of memory.");
  const XLA_FFI_Array* config = frame->attrs.size == 1 ? frame->attrs.attrs[0] : NULL;
  bool valid = config && frame->attrs.types[0] == XLA_FFI_AttrType_ARRAY && config->dtype == XLA_FFI_DataType_S64 &&
               config->size * sizeof(int64_t) == sizeof site->config;
  if (valid) memcpy(&site->config, config->data, sizeof site->config);
  valid = valid && site->config.kind >= FORWARD && site->config.kind <= MATMUL && site->config.stride > 0 &&
          site->config.groups > 0;
  if (!valid || pthread_mutex_init(&site->lock, NULL)) {
    free(site);
    return new_error(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, "`config` must be that of cnnjax.onednn.calls.");
  }
  XLA_FFI_State_Set_Args args = {.struct_size = XLA_FFI_State_Set_Args_STRUCT_SIZE,
                                 .ctx = frame->ctx,
                                 .stage = frame->stage,
                                 .type_id = &cnnjax_type_id,
                                 .state = site};
  XLA_FFI_Error* error = frame->api->XLA_FFI_State_Set(&args);
  if (error) destroy(site);
  return error;
}

// Returns the buffers of a call, or false if their number, dtypes or dimensions are wrong.
static bool find_buffers(const XLA_FFI_CallFrame* frame, int64_t kind, Buffers* buffers) {
  XLA_FFI_Buffer **in = (XLA_FFI_Buffer**)frame->args.args, **out = (XLA_FFI_Buffer**)frame->rets.rets;
  int64_t ins = frame->args.size, outs = frame->rets.size, rank = kind == MATMUL ? 2 : 4;
  if (ins < 2 || ins > (kind == FORWARD ? 3 : 2) || outs < 1 || outs > (kind == KERNEL_GRAD ? 2 : 1)) return false;
  if (kind == FORWARD || kind == MATMUL)
    *buffers = (Buffers){.image = in[0], .kernel = in[1], .bias = ins > 2 ? in[2] : NULL, .result = out[0]};
  else if (kind == IMAGE_GRAD)
    *buffers = (Buffers){.result = in[0], .kernel = in[1], .image = out[0]};
  else
    *buffers = (Buffers){.image = in[0], .result = in[1], .kernel = out[0], .bias = outs > 1 ? out[1] : NULL};
  const XLA_FFI_Buffer* all[] = {buffers->image, buffers->kernel, buffers->result, buffers->bias};
  for (int i = 0; i < 4; i++)
    if (all[i] && (all[i]->rank != (i < 3 ? rank : 1) ||
                   (all[i]->dtype != XLA_FFI_DataType_F32 && all[i]->dtype != XLA_FFI_DataType_BF16)))
      return false;
  return true;
}

XLA_FFI_Error* cnnjax_execute(XLA_FFI_CallFrame* frame) {
  if (answers_metadata(frame)) return NULL;
  XLA_FFI_State_Get_Args get = {.struct_size = XLA_FFI_State_Get_Args_STRUCT_SIZE,
                                .ctx = frame->ctx,
                                .stage = XLA_FFI_ExecutionStage_INSTANTIATE,
                                .type_id = &cnnjax_type_id};
  XLA_FFI_Error* error = frame->api->XLA_FFI_State_Get(&get);
  if (error) return error;
  Site* site = get.state;
  Buffers buffers;
  if (!find_buffers(frame, site->config.kind, &buffers))
    return new_error(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                     "Arrays must be float32 or bfloat16, of the number and dimensions of cnnjax.onednn.calls.");
  int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  pthread_mutex_lock(&site->lock);
  dnnl_status_t status = dnnl_success;
  if (!site->ready) {
    status = create(site, &buffers, num_threads(frame));
    site->ready = status == dnnl_success;
    if (!site->ready) destroy_contents(site);
  }
  pthread_mutex_unlock(&site->lock);
  if (status == dnnl_success) status = compute(frame, site, &buffers);
  omp_set_num_threads(threads);
  return status == dnnl_success ? NULL : error_of(frame->api, status, site, &buffers);
}

#include "elementwise.c"

// Prepares oneDNN. Returns its version, 10000 * major + 100 * minor + patch, or 0 if it failed.
int cnnjax_open(void) {
  if (pthread_key_create(&workspace_key, free_workspace)) return 0;
  if (dnnl_engine_create(&engine, dnnl_cpu, 0) || dnnl_stream_create(&stream, engine, dnnl_stream_in_order)) return 0;
  const dnnl_version_t* version = dnnl_version();
  return 10000 * version->major + 100 * version->minor + version->patch;
}
