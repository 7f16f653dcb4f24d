// Dense weight and mask -> packed weight.
#include <algorithm>
#include <vector>

#include "format.h"
#include "vec.h"
#include "wide.h"

namespace {

constexpr int WORDS = 4;  // a block has at most 256 columns

struct Matrix {
  const void* weight;
  const uint8_t* mask;
  int64_t rows, cols;
  bool at(int64_t row, int64_t col) const { return row < rows && mask[row * cols + col]; }
};

// Partners such that the columns kept by both are many: greedy over all pairs, best first.
void match(const std::vector<std::vector<uint64_t>>& kept, int most, std::vector<uint16_t>& order) {
  const int rows = (int)kept.size();
  std::vector<std::vector<uint32_t>> buckets(most + 1);
  for (int a = 0; a < rows; a++)
    for (int b = a + 1; b < rows; b++) {
      int both = 0;
      for (int w = 0; w < WORDS; w++) both += __builtin_popcountll(kept[a][w] & kept[b][w]);
      buckets[both].push_back((uint32_t)a << 16 | (uint32_t)b);
    }
  std::vector<bool> taken(rows, false);
  order.clear();
  for (int both = most; both >= 0; both--)
    for (uint32_t pair : buckets[both]) {
      const int a = (int)(pair >> 16), b = (int)(pair & 0xffff);
      if (taken[a] || taken[b]) continue;
      taken[a] = taken[b] = true;
      order.push_back((uint16_t)a);
      order.push_back((uint16_t)b);
    }
  for (int a = 0; a < rows; a++)  // an odd row out is paired with the one past the end
    if (!taken[a]) {
      order.push_back((uint16_t)a);
      order.push_back((uint16_t)rows);
    }
}

template <class W>
void pack_pairs(const Matrix& in, const Header& h, uint8_t* blob) {
  W* value = (W*)(blob + h.values);
  uint8_t* index = blob + h.index;
  uint16_t* units = (uint16_t*)(blob + h.units);
  uint8_t* common = blob + h.common;
  std::vector<uint16_t> order;
  for (int64_t r0 = 0; r0 < h.rows; r0 += h.row_block)
    for (int64_t k0 = 0; k0 < h.cols; k0 += h.col_block) {
      const int64_t rows = std::min<int64_t>(h.row_block, h.rows - r0);
      const int64_t cols = std::min<int64_t>(h.col_block, h.cols - k0);
      const int kept = (int)(cols * h.n / h.m);
      std::vector<std::vector<uint64_t>> bits(rows, std::vector<uint64_t>(WORDS, 0));
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < cols; k++)
          if (in.at(r0 + r, k0 + k)) bits[r][k / 64] |= 1ull << (k % 64);
      match(bits, kept, order);
      for (size_t p = 0; p < order.size(); p += 2) {
        const int64_t a = r0 + order[p], b = r0 + order[p + 1];
        const bool alone = order[p + 1] == rows;
        std::vector<int> both, only[2];
        for (int k = 0; k < cols; k++) {
          const bool in_a = in.at(a, k0 + k), in_b = !alone && in.at(b, k0 + k);
          if (in_a && in_b) both.push_back(k);
          else if (in_a) only[0].push_back(k);
          else if (in_b) only[1].push_back(k);
        }
        if (alone) {
          both = only[0];
          only[0].clear();
        }
        const W* weight = (const W*)in.weight;
        for (int i = 0; i < kept; i++)
          for (int side = 0; side < 2; side++) {
            const int k = i < (int)both.size() ? both[i] : only[side][i - both.size()];
            *index++ = (uint8_t)k;
            *value++ = side && alone ? W(0) : weight[(side ? b : a) * h.cols + k0 + k];
          }
        *units++ = order[p];
        *units++ = order[p + 1];
        *common++ = (uint8_t)both.size();
      }
    }
}

// The columns of the block at ``k0`` that the group of rows at ``g0`` keeps; the end of the list.
uint16_t* list_columns(const Matrix& in, const Header& h, int64_t g0, int64_t k0, uint16_t* index) {
  const int64_t k1 = std::min<int64_t>(h.cols, k0 + h.col_block);
  for (int64_t k = k0; k < k1; k++)
    if (in.at(g0, k)) *index++ = (uint16_t)(k - k0);
  return index;
}

template <class W>
void pack_shared(const Matrix& in, const Header& h, uint8_t* blob) {
  W* value = (W*)(blob + h.values);
  uint16_t* index = (uint16_t*)(blob + h.index);
  const W* weight = (const W*)in.weight;
  for (int64_t g0 = 0; g0 < h.rows; g0 += h.share)
    for (int64_t k0 = 0; k0 < h.cols; k0 += h.col_block) {
      const uint16_t* first = index;
      index = list_columns(in, h, g0, k0, index);
      for (int u = 0; u < h.group; u += h.layout)
        for (const uint16_t* i = first; i < index; i++)
          for (int r = u; r < u + h.layout; r++) {
            const bool real = r < h.share && g0 + r < h.rows;
            *value++ = real ? weight[(g0 + r) * h.cols + k0 + *i] : W(0);
          }
    }
}

void pack_wide(const Matrix& in, const Header& h, uint8_t* blob) {
  bf16* value = (bf16*)(blob + h.values);
  uint16_t* index = (uint16_t*)(blob + h.index);
  const bf16* weight = (const bf16*)in.weight;
  for (int64_t g0 = 0; g0 < h.rows; g0 += h.share)
    for (int64_t k0 = 0; k0 < h.cols; k0 += h.col_block) {
      const uint16_t* first = index;
      index = list_columns(in, h, g0, k0, index);
      const int kept = (int)(index - first);
      for (int u = 0; u < h.group; u += UNIT)
        for (int b = 0; b < blocks_of(kept); b++)
          for (int v = 0; v < UNIT * DEPTH; v++) {
            const bool paired = h.wide == BLOCKS;
            const int row = paired ? v / 2 % UNIT : v / DEPTH;
            const int i = b * DEPTH + (paired ? v / (2 * UNIT) * 2 + v % 2 : v % DEPTH);
            *value++ = i < kept ? weight[(g0 + u + row) * h.cols + k0 + first[i]] : bf16(0);
          }
    }
}

}  // namespace

// weight, mask: [rows, cols], dense; ``packed`` begins with its header. 0, or 1 without memory.
extern "C" int32_t sdm_pack(const void* weight, const uint8_t* mask, uint8_t* packed) try {
  const Header h = *(const Header*)packed;
  const Matrix in{weight, mask, h.rows, h.cols};
  if (h.wide) {
    pack_wide(in, h, packed);
  } else if (h.type == BF16) {
    h.share ? pack_shared<bf16>(in, h, packed) : pack_pairs<bf16>(in, h, packed);
  } else {
    h.share ? pack_shared<float>(in, h, packed) : pack_pairs<float>(in, h, packed);
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
