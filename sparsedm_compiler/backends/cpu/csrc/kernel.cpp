// y = act(W x + b) with W pruned to n of m, for Linear and Conv2d.
//
// Activations are packed feature-major into tiles of T vectors of tokens (output pixels), so that
// a kept weight is one broadcast and T fused multiply-adds on its column of the tile. Four
// layouts of W, all written by pack.cpp:
//   pairs   rows in twos, matched anew for every block of columns so that many columns are kept by
//           both: those are loaded once for two rows. For masks that are free per row.
//   shared  R rows with one column list: every column is loaded once for R rows.
//   wide    shared by 16 rows or more, bfloat16: see wide.h.
//   blocks  the same in whole blocks of columns: see blocks.h, which packs no activations.
#include <new>
#include <vector>

#include "blocks.h"
#include "format.h"
#include "multiply.h"
#include "norm.h"
#include "pieces.h"
#include "tiles.h"
#include "wide.h"

namespace {

// ---------------------------------------------------------------- one piece of work

constexpr int64_t KEPT = 1 << 20;  // floats of padded planes that stay allocated between calls

int64_t padded_rows(const Header& h, int64_t rows) {
  if (h.share) return divide_up(rows, h.share) * h.group;
  return rows + 1;  // an odd last row is paired with one nobody reads
}

// Values of a group of rows in the wide layout before column k, padded block by block.
int64_t wide_values(const Header& h, int64_t k) {
  const int per_block = blocks_of((int)((int64_t)h.col_block * h.n / h.m));
  const int rest = blocks_of((int)((k % h.col_block) * h.n / h.m));
  return (k / h.col_block * per_block + rest) * DEPTH * h.group;
}

template <int T>
void multiply_wide(const Work& work, const float* x, float* acc, int64_t row0, int64_t size,
                   int64_t k0, int64_t k1) {
  thread_local Scratch panel_scratch;
  const Header& h = work.h;
  const int64_t before = k0 * h.n / h.m, all = (int64_t)h.cols * h.n / h.m;
  const int kept = (int)((k1 - k0) * h.n / h.m);
  uint32_t* panel = (uint32_t*)panel_scratch.need((size_t)blocks_of(kept) * PAIRS * lanes<T>());
  const int64_t group0 = row0 / h.share, groups = divide_up(size, h.share);
  for (int64_t g = 0; g < groups; g++) {
    const uint16_t* index =
        (const uint16_t*)(work.call.weight + h.index) + (group0 + g) * all + before;
    const bf16* w = (const bf16*)(work.call.weight + h.values) +
                    (group0 + g) * wide_values(h, h.cols) + wide_values(h, k0);
    run_wide<T>(x, acc + g * h.group * lanes<T>(), w, index, h.group / UNIT, kept, k0 == 0,
                (Isa)work.call.isa, panel);
  }
}

// Rows [row0, row0 + size) += columns [k0, k1) of W times the tile's.
template <int T, class W>
void multiply(const Work& work, const float* x, float* acc, int64_t row0, int64_t size, int64_t k0,
              int64_t k1) {
  const Header& h = work.h;
  const uint8_t* blob = work.call.weight;
  const int64_t density_cols = (int64_t)h.cols * h.n / h.m;
  const int64_t before = k0 * h.n / h.m;
  const int kept = (int)((k1 - k0) * h.n / h.m);
  const W* values = (const W*)(blob + h.values);
  const bool first = k0 == 0;
  if (!h.share) {
    const int pairs = (int)((size + 1) / 2);
    const int64_t blocks = divide_up(h.cols, h.col_block);
    const int64_t at = row0 * density_cols + 2 * pairs * before;  // row blocks are even
    const int64_t unit = row0 / 2 * blocks + k0 / h.col_block * pairs;
    run_pairs<T, W>(x, acc, values + at, blob + h.index + at,
                    (const uint16_t*)(blob + h.units) + 2 * unit, blob + h.common + unit, pairs,
                    kept, first);
    return;
  }
  if constexpr (T <= MAX_SHARED_TILE && sizeof(W) == sizeof(bf16)) {
    if (h.wide) return multiply_wide<T>(work, x, acc, row0, size, k0, k1);
  }
  if constexpr (T <= MAX_SHARED_TILE) {
    const int64_t group0 = row0 / h.share, groups = divide_up(size, h.share);
    const int units = h.group / h.layout;
    for (int64_t g = 0; g < groups; g++) {
      const uint16_t* index = (const uint16_t*)(blob + h.index) + (group0 + g) * density_cols + before;
      const W* w = values + (group0 + g) * h.group * density_cols + before * h.group;
      float* c = acc + g * h.group * lanes<T>();
      if (h.layout == 4) run_shared<4, T, W>(x, c, w, index, units, kept, first, h.group * density_cols);
      if (h.layout == 3) run_shared<3, T, W>(x, c, w, index, units, kept, first, h.group * density_cols);
      if (h.layout == 2) run_shared<2, T, W>(x, c, w, index, units, kept, first, h.group * density_cols);
    }
  }
}

using Multiply = void (*)(const Work&, const float*, float*, int64_t, int64_t, int64_t, int64_t);

template <class W>
Multiply multiply_of(int vectors) {
  static const Multiply table[] = {nullptr,        multiply<1, W>, multiply<2, W>, multiply<3, W>,
                                   multiply<4, W>, multiply<5, W>, multiply<6, W>, multiply<7, W>,
                                   multiply<8, W>, multiply<9, W>, multiply<10, W>, multiply<11, W>,
                                   multiply<12, W>};
  return table[vectors];
}

// How a call is cut: tokens into ``groups`` and blocks of rows into ``parts``, each pair of which is a
// piece of work for one thread, that multiplies ``at_once`` rows before it writes them.
struct Plan {
  int64_t groups, parts, at_once;
};

// Output rows [row0, row1) of the tiles of a group. A block of W comes from far once: for the tiles
// after the first it lies in the second-level cache, as the sums of all tiles do.
void run_piece(const Work& work, const Tile* tiles, int64_t count, int64_t row0, int64_t row1,
               int64_t at_once) {
  thread_local Scratch x_scratch, acc_scratch;
  const Header& h = work.h;
  const Tile *end = tiles + count, *last = end - 1;
  const int64_t lanes = last->first + last->vectors * L - tiles->first;
  const bool pack_once = row1 - row0 > at_once;
  const int64_t acc_rows = padded_rows(h, std::min<int64_t>(h.row_block, h.rows));
  const int64_t blocks = divide_up(std::min(at_once, row1 - row0), h.row_block);
  // All of x is packed once, or what a tile needs next, time and again in the first-level cache.
  float* x = x_scratch.need(pack_once ? h.cols * lanes : h.col_block * MAX_PAIRS_TILE * L);
  float* acc = acc_scratch.need(acc_rows * blocks * lanes);
  const auto x_of = [&](const Tile& tile) { return x + (tile.first - tiles->first) * h.cols; };
  const auto acc_of = [&](const Tile& tile, int64_t block) {
    return acc + ((tile.first - tiles->first) * blocks + block * tile.vectors * L) * acc_rows;
  };
  if (pack_once)
    for (const Tile* tile = tiles; tile < end; tile++) pack(work, *tile, 0, h.cols, x_of(*tile));
  for (int64_t first = row0; first < row1; first += at_once) {
    const int64_t stop = std::min(row1, first + at_once);
    const auto each_block = [&](const Tile& tile, auto body) {
      for (int64_t row = first, i = 0; row < stop; row += h.row_block, i++)
        body(acc_of(tile, i), row, std::min<int64_t>(h.row_block, stop - row));
    };
    for (int64_t k0 = 0; k0 < h.cols; k0 += h.col_block) {
      const int64_t k1 = std::min<int64_t>(h.cols, k0 + h.col_block);
      for (const Tile* tile = tiles; tile < end; tile++) {
        const float* from = pack_once ? x_of(*tile) + k0 * tile->vectors * L : x;
        if (!pack_once) pack(work, *tile, k0, k1, x);
        const Multiply multiply = h.type == BF16 ? multiply_of<bf16>(tile->vectors)
                                                 : multiply_of<float>(tile->vectors);
        each_block(*tile, [&](float* sums, int64_t row, int64_t size) {
          multiply(work, from, sums, row, size, k0, k1);
        });
      }
    }
    for (const Tile* tile = tiles; tile < end; tile++)
      each_block(*tile, [&](const float* sums, int64_t row, int64_t size) {
        work.call.x_type == F32 ? unpack<float>(work, *tile, sums, row, size)
                                : unpack<bf16>(work, *tile, sums, row, size);
      });
  }
}

// The cut that takes least: of multiplications, and of packing x and writing y in their units.
Plan plan(const Call& c, const Header& h, int64_t vectors, int limit, int threads) {
  const int64_t cache = cache_of(c);
  const int64_t row_blocks = divide_up(h.rows, h.row_block);
  const int64_t at_once = std::max<int64_t>(1, 512 / h.row_block) * h.row_block;
  // The sums of a piece take a fifth of the cache, beside x and W; one tile where all of W stays.
  int64_t most = cache / 5 / (int64_t)sizeof(float) / L / std::min<int64_t>(at_once, h.rows);
  if (h.common - h.values < cache / 4) most = limit;
  const int64_t fewest = divide_up(vectors, std::max<int64_t>(limit, most));
  Plan best{fewest, 1, at_once};
  if (threads == 1) return best;
  double least = 0;
  const double kept = (double)h.cols * h.n / h.m;
  const int64_t last = std::min(vectors, divide_up(fewest, threads) * threads * 2);
  for (int64_t parts = 1; parts <= std::min<int64_t>(row_blocks, 2 * threads); parts++) {
    const double rows = (double)std::min<int64_t>(h.rows, divide_up(row_blocks, parts) * h.row_block);
    for (int64_t groups = fewest; groups <= last; groups++) {
      const double size = (double)vectors / (double)groups;  // threads take turns: the mean counts
      const double tiles = (double)divide_up(divide_up(vectors, groups), limit);
      const double multiplied = rows * kept * (size + 1.5 * tiles);
      const double moved = size * (4.0 * h.cols + 8.0 * rows);
      const double cost = (double)divide_up(groups * parts, threads) * (multiplied + moved);
      if (least == 0 || cost < 0.98 * least) {
        best = {groups, parts, at_once};
        least = cost;
      }
    }
  }
  return best;
}

// Writes the planes of a conv.
template <class X>
void fill_planes(const Work& work, float* to, int threads) {
  const Call& c = work.call;
  const int64_t count = c.images * c.channels, at_once = divide_up(count, 4 * threads);
  const auto each = [&](auto body) {  // a plane takes little: threads take several in a turn
    parallel(divide_up(count, at_once), threads, [&](int64_t part) {
      for (int64_t i = part * at_once; i < std::min(count, (part + 1) * at_once); i++) body(i);
    });
  };
  if (c.groups == 0) return each([&](int64_t i) { pad_plain<X>(work, to, i); });
  thread_local Scratch factors;
  float *scale = factors.need(2 * count), *shift = scale + count;
  parallel(c.images * c.groups, threads, [&](int64_t i) { find_scale<X>(c, i, scale, shift); });
  each([&](int64_t i) { pad_normalized<X>(work, to, i, scale[i], shift[i]); });
}

}  // namespace

extern "C" {

const char* sdm_isa() { return ISA_NAME; }

// 0, 1 if memory ran out, 2 for fp32 activations beside a weight packed for bfloat16.
int32_t sdm_run(const Call* call) try {
  const Call& c = *call;
  const Header& h = *(const Header*)c.weight;
  if (h.wide && c.x_type != BF16) return 2;
  if (c.tokens == 0 || h.rows == 0) return 0;
  const int threads = std::max(1, c.threads);
  const int64_t around = reads_in_place(c) ? 0 : 2;
  Work work{c, h, nullptr, c.height + around * c.pad_h, c.width + around * c.pad_w};
  thread_local Scratch small;
  Scratch large;  // not kept
  const bool as_is = c.x_type == F32 && c.pad_h == 0 && c.pad_w == 0;
  if (reads_planes(c) && (c.groups || !(as_is || reads_in_place(c)))) {
    const int64_t size = c.images * c.channels * work.plane_h * work.plane_w;
    float* planes = (size < KEPT ? small : large).need(size);
    c.x_type == BF16 ? fill_planes<bf16>(work, planes, threads) : fill_planes<float>(work, planes, threads);
    work.planes = planes;
  } else if (as_is) {
    work.planes = (const float*)c.x;
  }
  int failed = 0;
  if (h.wide == BLOCKS) {
    run_all_blocks(work, cache_of(c), threads, &failed);
    return failed;
  }
  const int64_t vectors = divide_up(c.tokens, L), row_blocks = divide_up(h.rows, h.row_block);
  const int limit = std::max(1, std::min(c.tile, widest_tile(h.share ? h.layout : 0)));
  const Plan cut = plan(c, h, vectors, limit, threads);
  std::vector<Tile> tiles;
  std::vector<int64_t> starts;
  for (int64_t group = 0; group < cut.groups; group++) {
    starts.push_back((int64_t)tiles.size());
    const int64_t from = vectors * group / cut.groups,
                  size = vectors * (group + 1) / cut.groups - from;
    const int64_t count = divide_up(size, limit);
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = size * i / count;
      tiles.push_back({(from + begin) * L, (int)(size * (i + 1) / count - begin), {}, false, {}});
      locate(work, tiles.back());
    }
  }
  starts.push_back((int64_t)tiles.size());
  parallel(cut.groups * cut.parts, threads, [&](int64_t item) {
    try {
      const int64_t part = item % cut.parts, group = item / cut.parts;
      const int64_t row0 = row_blocks * part / cut.parts * h.row_block;
      const int64_t row1 = row_blocks * (part + 1) / cut.parts * h.row_block;
      run_piece(work, &tiles[starts[group]], starts[group + 1] - starts[group], row0,
                std::min<int64_t>(h.rows, row1), cut.at_once);
    } catch (const std::bad_alloc&) {
      failed = 1;
    }
  });
  return failed;
} catch (const std::bad_alloc&) {
  return 1;
}

// Runs a call as it is cut for its threads, on one; the number of its pieces, of which ``room`` are
// written, or -1 where sdm_run fails.
int64_t sdm_time(const Call* call, double* seconds, int32_t* loops, int64_t room) {
  PieceTimes times{seconds, loops, room, 0, 0};
  piece_times = &times;
  const int32_t failed = sdm_run(call);
  piece_times = nullptr;
  return failed ? -1 : times.count;
}
}
