// What all pieces of work share: memory of a thread, the cache's size, the threads.
#pragma once
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#include "tiles.h"

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Scratch {
  float* data = nullptr;
  size_t size = 0;
  float* need(size_t floats) {
    if (floats > size) {
      ::operator delete[](data, std::align_val_t(64));
      data = nullptr;  // what follows may throw
      size = 0;
      data = (float*)::operator new[](floats * sizeof(float), std::align_val_t(64));
      size = floats;
    }
    return data;
  }
  ~Scratch() { ::operator delete[](data, std::align_val_t(64)); }
};

inline int64_t read_cache_size() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return 1 << 20;
}

inline int64_t cache_of(const Call& c) {
  static const int64_t stated = read_cache_size();
  return c.cache > 0 ? c.cache : stated;
}

// CPU seconds of every piece and the loop that it is of, where they are asked for: one thread runs all
// then.
struct PieceTimes {
  double* seconds;
  int32_t* loops;
  int64_t room, count;
  int32_t loop;
};
inline thread_local PieceTimes* piece_times = nullptr;

inline double read_cpu_clock() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

template <class F>
void time_pieces(PieceTimes& times, int64_t count, F body) {
  for (int64_t i = 0; i < count; i++) {
    const double start = read_cpu_clock();
    body(i);
    if (times.count < times.room) {
      times.seconds[times.count] = read_cpu_clock() - start;
      times.loops[times.count] = times.loop;
    }
    times.count++;
  }
  times.loop++;
}

template <class F>
void parallel(int64_t count, int threads, F body) {
  if (piece_times) return time_pieces(*piece_times, count, body);
  (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && count > 1)
  for (int64_t i = 0; i < count; i++) body(i);
}
