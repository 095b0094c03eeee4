// The index arithmetic of the operators, written once for the CPU and the GPU.
// A map (B, H, W, channels) is cut into h x w windows of M x M tokens, which may reach beyond its right and bottom
// border.  A strip is the M tokens that a window has in one row: side by side in the map and in the window, so that a
// kernel divides once per strip and then only adds.  Tensors may have more than 2^31 elements: counts are 64-bit.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

struct Strip {
  int64_t b, y, x;           // image, row and column of its first token
  int64_t window, position;  // the window, 0 .. B·h·w, and that token's place in it, 0 .. M²
  int64_t tokens;            // how many of the M tokens are on the map
};

struct Windows {
  int64_t B, H, W, heads, d, M;
  int64_t h = (H + M - 1) / M, w = (W + M - 1) / M;
  HOST_DEVICE int64_t channels() const { return heads * d; }
  HOST_DEVICE int64_t count() const { return B * h * w; }
  HOST_DEVICE int64_t strips() const { return count() * M; }
  // Strips are numbered row by row, as they lie in the map; strip s + w is the one below.
  HOST_DEVICE Strip strip(int64_t s) const {
    const int64_t row = s / w, b = row / (h * M), y = row % (h * M), x = s % w * M;
    return {b, y, x, (b * h + y / M) * w + s % w, y % M * M, y >= H ? 0 : W - x < M ? W - x : M};
  }
  HOST_DEVICE int64_t first_strip(int64_t window) const { return window / w * M * w + window % w; }
  // A token in (B, H, W, ...), counted in tokens.
  HOST_DEVICE int64_t token(int64_t b, int64_t y, int64_t x) const { return (b * H + y) * W + x; }
  // One head's d channels of a token in (3, windows, heads, M², d), counted in d channels; third: 0 for Q, 1 K, 2 V.
  HOST_DEVICE int64_t group(int64_t third, int64_t window, int64_t head, int64_t position) const {
    return ((third * count() + window) * heads + head) * M * M + position;
  }
};

// Of attention's output (windows, heads, M², d): `scaled_dot_product_attention` lays it out as it likes.
struct Strides {
  int64_t window, head, position;
  // Where one head of token i of a strip begins.
  HOST_DEVICE int64_t at(const Strip& t, int64_t head_, int64_t i) const {
    return t.window * window + head_ * head + (t.position + i) * position;
  }
};
