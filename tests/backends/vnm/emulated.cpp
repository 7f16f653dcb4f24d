// vnm.cu for a CPU: emulator.h, the activation, the kernels, and the loop over blocks and threads.
#include "emulator.h"

#include "activated.cuh"
#include "vnm.cu"

namespace emulator {

static LaunchArguments problem;
static void (*kernel)(LaunchArguments);

static void begin() {
  kernel(problem);
  self().done = true;
  while (true) yield();
}

// Run a block of `count` threads, whose order is shuffled by `seed` in every round.
static void run_block(int count, u32 seed) {
  std::memset(shared, 0xff, SHARED);
  for (auto& thread : threads) {
    thread.done = false;
    thread.open.clear();
    thread.groups.clear();
    getcontext(&thread.context);
    thread.stack.resize(STACK);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = STACK;
    makecontext(&thread.context, begin, 0);
  }
  warps.assign(count / 32, {});
  block = {};
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = i;
  for (int left = count; left;) {
    for (int i = count - 1; i > 0; --i) {
      seed = seed * 1664525u + 1013904223u;
      std::swap(order[i], order[seed / 65536 % (i + 1)]);
    }
    left = 0;
    for (int thread : order) {
      if (threads[thread].done) continue;
      current = thread;
      swapcontext(&scheduler, &threads[thread].context);
      left += !threads[thread].done;
    }
  }
}

static void run(void (*entry)(LaunchArguments), const LaunchArguments& given, int wide, int high, int count,
                u32 seed) {
  kernel = entry, problem = given;
  const u8* x = (const u8*)given.x;
  const i64 blocks = given.rows / SHARE;
  readable = {{x, x + 2 * ((given.cols - 1) * given.x_stride + given.tokens)},
              {given.packed, given.packed + given.columns + blocks * given.steps * 64}};
  threads.resize(count);
  for (int y = 0; y < high; ++y)
    for (int x = 0; x < wide; ++x) {
      blockIdx = {x, y, 0};
      run_block(count, seed++);
    }
}

}  // namespace emulator

extern "C" void emulate(int turn, const LaunchArguments* problem, int wide, int high, int count, u32 seed) {
  emulator::run(turn ? to_feature_major : vnm_linear, *problem, wide, high, count, seed);
}
