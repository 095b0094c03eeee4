// Index arithmetic of the operators, shared by the CPU and the GPU.
// A map (B, H, W, channels) is split into h x w windows of M x M tokens, which may extend beyond its right and bottom
// borders.  A strip is one row of a window: M tokens that are adjacent both in the map and in the window, so a kernel
// divides once per strip and then only adds.  Indices are 64-bit, as tensors may have more than 2^31 elements.
#pragma once
#include <cstdint>

struct Strip {
  int64_t b, y, x;           // image, row and column of its first token
  int64_t window, position;  // its window, 0 .. B·h·w, and the first token's index in the window, 0 .. M²
  int64_t tokens;            // how many of its M tokens are inside the map
};

struct Windows {
  int64_t B, H, W, heads, d, M;
  int64_t h = (H + M - 1) / M, w = (W + M - 1) / M;
  constexpr int64_t channels() const { return heads * d; }
  constexpr int64_t largest() const { return (M < H ? M : H) * (M < W ? M : W); }  // tokens of a window on the map
  constexpr int64_t count() const { return B * h * w; }
  constexpr int64_t strips() const { return count() * M; }
  // Strips are numbered row by row through the map; strip s + w is the one below strip s.
  constexpr Strip strip(int64_t s) const {
    const int64_t row = s / w, b = row / (h * M), y = row % (h * M), x = s % w * M;
    return {b, y, x, (b * h + y / M) * w + s % w, y % M * M, y >= H ? 0 : W - x < M ? W - x : M};
  }
  constexpr int64_t first_strip(int64_t window) const { return window / w * M * w + window % w; }
  // Offset of a token in (B, H, W, ...), in tokens.
  constexpr int64_t token(int64_t b, int64_t y, int64_t x) const { return (b * H + y) * W + x; }
  // Offset of one head of a token in (3, windows, heads, M², d), in units of d; third: 0 for Q, 1 for K, 2 for V.
  constexpr int64_t group(int64_t third, int64_t window, int64_t head, int64_t position) const {
    return ((third * count() + window) * heads + head) * M * M + position;
  }
};

// Strides of attention's output (windows, heads, M², d), whose layout `scaled_dot_product_attention` chooses.
struct Strides {
  int64_t window, head, position;
  // Offset of one head of token i of a strip.
  constexpr int64_t at(const Strip& t, int64_t head_, int64_t i) const {
    return t.window * window + head_ * head + (t.position + i) * position;
  }
};
