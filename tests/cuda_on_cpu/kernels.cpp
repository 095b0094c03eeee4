// csrc/partition_merge_cuda.cu compiled for a CPU, and functions used only by the tests.
#include "cuda_runtime_api.h"

#define MAX_THREADS cuda_on_cpu::max_threads
#define MAX_BLOCKS cuda_on_cpu::max_blocks
#include "../../csrc/partition_merge_cuda.cu"

extern "C" void launch_with(int64_t max_threads, int64_t max_blocks, int64_t failing_launch, int64_t seed) {
  cuda_on_cpu::max_threads = max_threads;
  cuda_on_cpu::max_blocks = max_blocks;
  cuda_on_cpu::failing_launch = failing_launch;
  cuda_on_cpu::random.seed(seed);
}

// For testing windows.h: everything about strip s and the position of its token i.
extern "C" void windows_h(const int64_t sizes[6], int64_t s, int64_t i, int64_t third, int64_t head, int64_t out[12]) {
  const Windows g = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  const Strip t = g.strip(s);
  const Strides strides = {g.heads * g.M * g.M * g.d, g.d, g.heads * g.d};
  const int64_t values[] = {g.count(), g.strips(), t.b, t.y, t.x, t.window, t.position, t.tokens,
                            g.token(t.b, t.y, t.x + i), g.group(third, t.window, head, t.position + i),
                            strides.at(t, head, i), g.first_strip(t.window)};
  std::copy(std::begin(values), std::end(values), out);
}
