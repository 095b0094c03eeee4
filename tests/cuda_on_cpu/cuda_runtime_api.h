// CUDA on a CPU: the parts of the CUDA runtime that csrc/partition_merge_cuda.cu uses, so that a C++ compiler builds the
// unmodified kernels and every thread of every block runs on the CPU, under a debugger or a sanitizer.
//
// Blocks run one after the other.  The threads of a block are fibers: each runs until __syncthreads() or its end, and
// none continues before all have arrived.  The order is random each time, to expose code that depends on it.  With
// -DREAL_THREADS they are CPU threads that run concurrently, so that ThreadSanitizer can find data races.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#ifdef REAL_THREADS
inline thread_local dim3 threadIdx;
#else
inline dim3 threadIdx;
#endif
inline dim3 blockIdx, blockDim, gridDim;

using cudaStream_t = struct Stream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_on_cpu {

// Set by the tests: upper limits for a kernel's threads per block and blocks per grid, the index of the launch that
// fails, and the random generator of the order.
inline int64_t max_threads = 256, max_blocks = INT32_MAX, failing_launch = -1;
inline std::mt19937 random;

inline std::vector<unsigned> in_any_order(unsigned n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

inline dim3 index(unsigned n, dim3 size) { return {n % size.x, n / size.x % size.y, n / size.x / size.y}; }

#ifdef REAL_THREADS

inline std::unique_ptr<std::barrier<>> barrier;
inline void wait_for_the_block() { barrier->arrive_and_wait(); }

inline void run_block(unsigned threads, const std::function<void()>& kernel) {
  barrier = std::make_unique<std::barrier<>>(threads);
  std::vector<std::thread> running;
  for (unsigned n : in_any_order(threads))
    running.emplace_back([n, &kernel] {
      threadIdx = index(n, blockDim);
      kernel();
    });
  for (std::thread& thread : running) thread.join();
}

#else

struct Fiber {
  static constexpr size_t stack_size = 1 << 17;
  std::unique_ptr<char[]> stack{new char[stack_size]};
  jmp_buf place;  // where it resumes
  bool started = false, at_its_end;
};
inline std::vector<Fiber> fibers;
inline Fiber* running;
inline jmp_buf scheduler;
inline const std::function<void()>* kernel_of_fibers;

inline void wait_for_the_block() {
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  for (;;) {
    (*kernel_of_fibers)();
    running->at_its_end = true;
    wait_for_the_block();
  }
}

// Runs a fiber until it waits.  Only its start needs ucontext, which is slower than longjmp.
inline void resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = Fiber::stack_size;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

inline void run_block(unsigned threads, const std::function<void()>& kernel) {
  kernel_of_fibers = &kernel;
  if (fibers.size() < threads) fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.at_its_end = false;
  for (unsigned ended = 0; ended < threads;) {
    for (unsigned n : in_any_order(threads)) {
      threadIdx = index(n, blockDim);
      resume(fibers[n]);
      ended += fibers[n].at_its_end;
    }
    if (ended > 0 && ended < threads) {
      std::fprintf(stderr, "__syncthreads() was reached by some threads of a block and not by the others\n");
      std::abort();
    }
  }
}

#endif

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_for_the_block(); }

template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... arguments) {
  gridDim = config->gridDim, blockDim = config->blockDim;
  const uint64_t threads = uint64_t(blockDim.x) * blockDim.y, blocks = uint64_t(gridDim.x) * gridDim.y;
  if (threads < 1 || threads > 1024 || blocks < 1 || gridDim.x > INT32_MAX || gridDim.y > 65535)
    return cudaErrorInvalidConfiguration;
  if (cuda_on_cpu::failing_launch-- == 0) return cudaErrorLaunchFailure;
  for (unsigned n : cuda_on_cpu::in_any_order(blocks)) {
    blockIdx = cuda_on_cpu::index(n, gridDim);
    cuda_on_cpu::run_block(threads, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}
