// What comes before a convolution on planes: its input is padded, where it is not read in place, and
// normalized and activated on the way behind a GroupNorm.
#pragma once
#include <algorithm>
#include <cmath>

#include "act.h"
#include "tiles.h"

// The sum of f over the values of a plane.
template <class X, class F>
double sum_plane(const X* x, int64_t size, F f) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= size; i += 4 * L)
    for (int k = 0; k < 4; k++) sums[k] += f(load_wide(x + i + k * L));
  for (; i + L <= size; i += L) sums[0] += f(load_wide(x + i));
  const vf all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int l = 0; l < L; l++) sum += all[l];
  for (; i < size; i++) sum += f(splat(widen(x[i])))[0];
  return sum;
}

// scale and shift of the channels of one group of one image: GroupNorm(x + offset) is
// scale x + shift. The variance is that of the differences from the mean.
template <class X>
void find_scale(const Call& c, int64_t item, float* scale, float* shift) {
  const int64_t image = item / c.groups, group = item % c.groups;
  const int64_t per = c.channels / c.groups, size = c.height * c.width, first = group * per;
  const X* x = (const X*)c.x + (image * c.channels + first) * size;
  const float* offset = c.offset ? c.offset + image * c.offset_stride + first : nullptr;
  const auto offset_of = [&](int64_t k) { return offset ? offset[k] : 0.0f; };
  double sum = 0, squares = 0;
  for (int64_t k = 0; k < per; k++)
    sum += sum_plane(x + k * size, size, [](vf v) { return v; }) + (double)size * offset_of(k);
  const double mean = sum / (double)(per * size);
  for (int64_t k = 0; k < per; k++) {
    const vf away = splat((float)(offset_of(k) - mean));
    squares += sum_plane(x + k * size, size, [&](vf v) { return (v + away) * (v + away); });
  }
  const double inverse_deviation = 1 / std::sqrt(squares / (double)(per * size) + c.epsilon);
  for (int64_t k = 0; k < per; k++) {
    const int64_t channel = first + k, at = image * c.channels + channel;
    const double factor = c.norm_weight ? inverse_deviation * c.norm_weight[channel] : inverse_deviation;
    scale[at] = (float)factor;
    shift[at] = (float)((offset_of(k) - mean) * factor + (c.norm_bias ? c.norm_bias[channel] : 0.0f));
  }
}

// act(scale x + shift) for ``size`` values side by side.
template <Act A, class X>
void normalize(const X* x, float* to, int64_t size, vf scale, vf shift) {
  const auto run = [&](const X* from, float* dst) { store(dst, act_v<A>(load_wide(from) * scale + shift)); };
  int64_t i = 0;
  for (; i + L <= size; i += L) run(x + i, to + i);
  if (i == size) return;
  X rest[L] = {};
  float out[L];
  std::copy_n(x + i, size - i, rest);
  run(rest, out);
  std::copy_n(out, size - i, to + i);
}

// Copy of one plane of x, with zero padding where the planes are larger, as fp32: [images, channels,
// plane_h, plane_w].
// ``fill`` writes so many values from x. With ``together`` it writes all at once, to the end of the
// plane, from where the rows move to their places: a row never reaches those that wait.
template <class X, class F>
void pad_plane(const Work& work, float* dst, int64_t index, bool together, F fill) {
  const Call& c = work.call;
  const int64_t plane_h = work.plane_h, plane_w = work.plane_w;
  const int64_t size = c.height * c.width;
  const X* src = (const X*)c.x + index * size;
  dst += index * plane_h * plane_w;
  if (plane_h == c.height && plane_w == c.width) return fill(src, dst, size);
  float* waiting = dst + plane_h * plane_w - size;
  if (together) fill(src, waiting, size);
  std::fill(dst, dst + c.pad_h * plane_w, 0.0f);
  dst += c.pad_h * plane_w;
  for (int64_t y = 0; y < c.height; y++, dst += plane_w) {
    float* to = std::fill_n(dst, c.pad_w, 0.0f);
    if (together) {
      std::memmove(to, waiting + y * c.width, c.width * sizeof(float));
    } else {
      fill(src + y * c.width, to, c.width);
    }
    std::fill_n(to + c.width, c.pad_w, 0.0f);
  }
  std::fill(dst, dst + c.pad_h * plane_w, 0.0f);
}

template <class X>
void pad_plain(const Work& work, float* dst, int64_t index) {
  pad_plane<X>(work, dst, index, false, [](const X* from, float* to, int64_t size) {
    if constexpr (sizeof(X) == sizeof(float)) {
      std::memcpy(to, from, size * sizeof(float));
    } else {
      for (int64_t z = 0; z < size; z++) to[z] = widen(from[z]);
    }
  });
}

// Rows shorter than a vector are normalized together.
template <class X>
void pad_normalized(const Work& work, float* dst, int64_t index, float scale, float shift) {
  const Call& c = work.call;
  const vf by = splat(scale), plus = splat(shift);
  pad_plane<X>(work, dst, index, c.width < L, [&](const X* from, float* to, int64_t size) {
    if (c.pre_act == SILU) return normalize<SILU>(from, to, size, by, plus);
    normalize<NONE>(from, to, size, by, plus);
  });
}
