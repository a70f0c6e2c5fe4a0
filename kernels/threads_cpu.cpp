// The threads that all kernels here share.
#include "native.h"

Parallel start_parallel = nullptr;
Number thread_number = nullptr, thread_count = nullptr;

EXPORT void use_threads(void *parallel, void *number, void *count) {
  start_parallel = (Parallel)parallel;
  thread_number = (Number)number, thread_count = (Number)count;
}
