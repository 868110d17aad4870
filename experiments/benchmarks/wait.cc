// An operation of XLA that waits without using a core, as the host does while an accelerator computes. See runs.py.

#include <time.h>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// When each wait began and ended, as time.time().
extern "C" {
double spans[4096][2];
int count = 0;
}

static double now() {
  timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

static ffi::Error WaitFor(double seconds, ffi::Buffer<ffi::S32> x, ffi::Result<ffi::Buffer<ffi::S32>> y) {
  double begin = now();
  timespec time = {static_cast<time_t>(seconds), static_cast<long>(1e9 * (seconds - static_cast<time_t>(seconds)))};
  nanosleep(&time, nullptr);
  *y->typed_data() = *x.typed_data();
  if (count < 4096) {
    spans[count][0] = begin;
    spans[count++][1] = now();
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Wait, WaitFor,
                              ffi::Ffi::Bind()
                                  .Attr<double>("seconds")
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
