// A block of CUDA threads on a CPU: each thread is a fiber, whole-warp instructions are meetings.
//
// It gives a C++ compiler what device.cuh gives to NVRTC, and is as strict as the GPU may be: a copy
// arrives only when its thread waits for it, shared memory begins as NaN, and threads run in a
// shuffled order. Layouts are those of the PTX ISA, sections "Matrix fragments for mma.m16n8k16",
// "... for sparse mma.m16n8k32", "ldmatrix" and "movmatrix".
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int64_t i64;
struct uint4 {
  u32 x, y, z, w;
};
struct dim3 {
  int x, y, z;
};

#define DEVICE static inline
#define __global__
#define __launch_bounds__(n)

namespace emulator {

constexpr int SHARED = 256 * 1024;
constexpr int STACK = 256 * 1024;

struct Copy {
  u32 to;
  const void* from;
  int bytes;
};

// What may be read: the copies that a kernel starts must keep to one of these.
struct Range {
  const u8 *begin, *end;
};
static std::vector<Range> readable;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  u32 given[16];   // what it brings to a meeting of its warp
  float sums[4];
  u32 taken[4];
  int meetings = 0, barriers = 0;
};

struct Meeting {
  int arrived = 0, turn = 0;
};

alignas(128) u8 shared[SHARED];
std::vector<Thread> threads;
std::vector<Meeting> warps;
Meeting block;
ucontext_t scheduler;
int current;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline Thread& self() { return threads[current]; }
inline void yield() { swapcontext(&threads[current].context, &scheduler); }

// Wait until `count` threads have come; the last one does the work for all.
inline void meet(Meeting& meeting, int count, const std::function<void()>& work) {
  const int turn = meeting.turn;
  if (++meeting.arrived == count) {
    work();
    meeting.arrived = 0;
    ++meeting.turn;
    return;
  }
  while (meeting.turn == turn) yield();
}

inline void warp_meets(const std::function<void(Thread*)>& work) {
  const int warp = current / 32;
  meet(warps[warp], 32, [&] { work(&threads[32 * warp]); });
}

inline float from_half(u16 bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(float(fraction), -24)
                                : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -value : value;
}

inline u16 to_half(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  const u32 sign = bits >> 16 & 0x8000;
  const float size = std::fabs(value);
  if (size == 0) return u16(sign);
  if (std::isnan(value)) return u16(sign | 0x7e00);
  if (size >= 65520.0f) return u16(sign | 0x7c00);
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  const long places = std::lrint(std::ldexp(size, -unit));
  if (unit == -24) return u16(sign | u32(places));  // subnormal, or just above
  return u16(sign + (u32(unit + 24) << 10) + u32(places));
}

inline float from_bfloat(u16 bits) {
  const u32 wide = u32(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline u16 to_bfloat(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return u16(bits >> 16 | 0x40);
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator

#define shared_bytes emulator::shared
static dim3 blockIdx;
struct ThreadIdx {
  operator int() const { return emulator::current; }
};
static struct {
  ThreadIdx x;
} threadIdx;

DEVICE u32 shared_at(const void* pointer) { return u32((const u8*)pointer - emulator::shared); }
DEVICE u32 lane_id() { return emulator::current % 32; }
DEVICE float widened(u16 value) {
  return BFLOAT16 ? emulator::from_bfloat(value) : emulator::from_half(value);
}
DEVICE u32 rounded(float low, float high) {
  const auto round = BFLOAT16 ? emulator::to_bfloat : emulator::to_half;
  return round(low) | u32(round(high)) << 16;
}

DEVICE void copy_async(u32 to, const void* from, int bytes) {
  if (to % 16 || (uintptr_t)from % 16 || to + 16 > emulator::SHARED || bytes < 0 || bytes > 16)
    emulator::fail("a copy that is not aligned, or out of bounds");
  const u8 *begin = (const u8*)from, *end = begin + bytes;
  bool inside = bytes == 0;
  for (const auto& range : emulator::readable)
    inside |= range.begin <= begin && end <= range.end;
  if (!inside) emulator::fail("a copy from where nothing lies");
  emulator::self().open.push_back({to, from, bytes});
}
DEVICE void copy_commit() {
  emulator::self().groups.push_back(std::move(emulator::self().open));
  emulator::self().open.clear();
}
template <int left>
DEVICE void copy_wait() {
  auto& groups = emulator::self().groups;
  for (; int(groups.size()) > left; groups.pop_front())
    for (const auto& copy : groups.front()) {
      std::memset(emulator::shared + copy.to, 0, 16);
      std::memcpy(emulator::shared + copy.to, copy.from, copy.bytes);
    }
}
DEVICE void __syncthreads() {
  emulator::meet(emulator::block, int(emulator::threads.size()), [] {});
}
DEVICE void __syncwarp() {
  emulator::warp_meets([](emulator::Thread*) {});
}

DEVICE void load_transposed(u32 (&to)[4], u32 row) {
  if (row % 16 || row + 16 > emulator::SHARED) emulator::fail("ldmatrix out of bounds");
  emulator::self().given[0] = row;
  emulator::warp_meets([](emulator::Thread* lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        u32 pair = 0;
        for (int low = 0; low < 2; ++low) {
          const u32 at = lanes[8 * matrix + 2 * (lane % 4) + low].given[0];
          u16 value;
          std::memcpy(&value, emulator::shared + at + 2 * (lane / 4), 2);
          pair |= u32(value) << (16 * low);
        }
        lanes[lane].taken[matrix] = pair;
      }
  });
  std::memcpy(to, emulator::self().taken, 16);
}

DEVICE u32 transposed(u32 pair) {
  emulator::self().given[0] = pair;
  emulator::warp_meets([](emulator::Thread* lanes) {
    const auto value = [&](int row, int col) {
      return u16(lanes[4 * row + col / 2].given[0] >> (16 * (col % 2)));
    };
    for (int lane = 0; lane < 32; ++lane)
      lanes[lane].taken[0] =
          value(2 * (lane % 4), lane / 4) | u32(value(2 * (lane % 4) + 1, lane / 4)) << 16;
  });
  return emulator::self().taken[0];
}

DEVICE void multiply_sparse(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
  auto& self = emulator::self();
  std::memcpy(self.given, a, 16);
  std::memcpy(self.given + 4, b, 16);
  self.given[8] = meta;
  std::memcpy(self.sums, sum, 16);
  emulator::warp_meets([](emulator::Thread* lanes) {
    // a[row][stored]: registers 0, 2 hold rows 0-7, 1, 3 rows 8-15; 0, 1 stored columns 0-7.
    float dense[16][32] = {};
    for (int row = 0; row < 16; ++row)
      for (int group = 0; group < 8; ++group) {
        // Threads 0 and 1 of a quad hold the places of columns 0-15 and 16-31; the lower half is
        // that of row quad, the upper of row quad + 8.
        const u32 word = lanes[4 * (row % 8) + group / 4].given[8] >> (16 * (row / 8));
        const int places = word >> (4 * (group % 4)) & 15;
        if ((places & 3) >= places >> 2) emulator::fail("metadata that is not in order");
        for (int i = 0; i < 2; ++i) {
          const int stored = 2 * group + i;
          const u32 pair =
              lanes[4 * (row % 8) + stored % 8 / 2].given[2 * (stored / 8) + row / 8];
          dense[row][4 * group + (places >> (2 * i) & 3)] = widened(u16(pair >> (16 * (stored % 2))));
        }
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
        double total = lanes[lane].sums[i];
        for (int k = 0; k < 32; ++k) {
          const u32 pair = lanes[4 * col + k % 8 / 2].given[4 + k / 8];
          total += double(dense[row][k]) * widened(u16(pair >> (16 * (k % 2))));
        }
        lanes[lane].sums[i] = float(total);
      }
  });
  std::memcpy(sum, self.sums, 16);
}
