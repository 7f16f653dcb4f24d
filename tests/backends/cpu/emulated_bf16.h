// AMX and AVX512-BF16 in plain C++, in the place of their intrinsics: tiles as Intel's manual has them,
// with a stop where a program breaks one of their rules. Included before the kernels.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EMULATED_BF16
#define BF16_TARGETS
#define DPBF16_TARGET
#define AMX_TARGET

namespace emulated {

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));

inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", rule);
  std::abort();
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// acc + low x low y + high x high y of two pairs of bfloat16; denormals count as zero.
inline float add_pair(float acc, uint32_t x, uint32_t y) {
  const float high = as_float(x & 0xffff0000u) * as_float(y & 0xffff0000u);
  return acc + as_float(x << 16) * as_float(y << 16) + high;
}

struct Tiles {
  bool configured = false;
  uint16_t bytes[8];
  uint8_t rows[8];
  uint32_t data[8][16][16];  // tile, row, four bytes
};
inline thread_local Tiles tiles;

inline void configure(const void* config) {
  const uint8_t* from = (const uint8_t*)config;
  require(from[0] == 1 && from[1] == 0, "the palette is not 1");
  for (int i = 2; i < 16; i++) require(from[i] == 0, "reserved bytes are set");
  for (int i = 0; i < 8; i++) {
    std::memcpy(&tiles.bytes[i], from + 16 + 2 * i, 2);
    tiles.rows[i] = from[48 + i];
    require(tiles.bytes[i] <= 64 && tiles.rows[i] <= 16, "a tile is too large");
    require((tiles.bytes[i] == 0) == (tiles.rows[i] == 0), "a tile has rows without columns");
  }
  std::memset(tiles.data, 0, sizeof tiles.data);
  tiles.configured = true;
}

inline void require_tile(int tile) {
  require(tiles.configured && tiles.rows[tile], "a tile is used that is not configured");
}

inline void zero(int tile) {
  require_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

inline void load(int tile, const void* from, int64_t stride) {
  require_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int r = 0; r < tiles.rows[tile]; r++)
    std::memcpy(tiles.data[tile][r], (const char*)from + r * stride, tiles.bytes[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
  require_tile(tile);
  for (int r = 0; r < tiles.rows[tile]; r++)
    std::memcpy((char*)to + r * stride, tiles.data[tile][r], tiles.bytes[tile]);
}

// c [rows of a][columns of b] += a [rows][pairs] times b [pairs][columns].
inline void multiply(int c, int a, int b) {
  require_tile(a), require_tile(b), require_tile(c);
  require(a != b && b != c && a != c, "two operands are one tile");
  require(tiles.rows[c] == tiles.rows[a] && tiles.bytes[c] == tiles.bytes[b] &&
              tiles.bytes[a] == 4 * tiles.rows[b],
          "the operands do not fit");
  for (int m = 0; m < tiles.rows[c]; m++)
    for (int k = 0; k < tiles.rows[b]; k++)
      for (int n = 0; n < tiles.bytes[c] / 4; n++) {
        const float sum = add_pair(as_float(tiles.data[c][m][n]), tiles.data[a][m][k], tiles.data[b][k][n]);
        std::memcpy(&tiles.data[c][m][n], &sum, 4);
      }
}

inline void release() { tiles.configured = false; }

}  // namespace emulated

inline emulated::v16f dot(emulated::v16f a, emulated::v16i x, emulated::v16i y) {
  for (int i = 0; i < 16; i++) a[i] = emulated::add_pair(a[i], (uint32_t)x[i], (uint32_t)y[i]);
  return a;
}

#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated::multiply(c, a, b)
#define _tile_release() emulated::release()
