// A packed weight: this header, then its sections, in one block of memory that can be saved.
#pragma once
#include <cstdint>

// Mirrored by format.py: change them together.
struct Header {
  int32_t magic, type, layout;     // type of a value; layout: rows per unit (2 in pairs)
  int32_t rows, cols, n, m;        // cols: every tap of a kernel has its own run of channels
  int32_t share, group;            // rows that share a mask (0: each its own); the same, padded to units
  int32_t col_block, row_block;    // multiples of m and of whole units
  int32_t wide;                     // 1: the bfloat16 layout of wide.h, 2: that of blocks.h
  int64_t values, index, units, common;  // where the sections begin, in bytes
};

// pairs   values [row block][column block][pair][kept][2], index alike as uint8 (column in block),
//         units  [row block][column block][pair][2] as uint16 (row in block),
//         common [row block][column block][pair] as uint8: the first kept columns, equal in both.
// shared  values [group][column block][unit][kept][layout], index [group][column block][kept] as
//         uint16 (column in block).
// wide    values [group][column block][unit of 16][block of 32 kept][16][32], padded with zeros,
//         index as in shared.
// blocks  the same, but [16 pairs of columns][16 rows][2] in a block, whose columns lie side by side.
enum Layout : int32_t { NARROW = 0, WIDE = 1, BLOCKS = 2 };
constexpr int32_t MAGIC = 0x314d4e53;  // "SNM1"
