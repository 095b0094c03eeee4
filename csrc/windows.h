// The index arithmetic of both operators, written once for the CPU and the GPU.
//
// A map (B, H, W, channels) is cut into h x w windows of M x M tokens; at the right and bottom border windows reach
// beyond the map.  The kernels work in strips: a strip is the M tokens that one window has in one row of the map.
// They are neighbours in memory on both sides, so a kernel divides once per strip and only adds within it.
//
// All offsets are 64-bit: a tensor may have more than 2^31 elements.  Counts within one strip stay far below that.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

enum class Type { Float32, Float64, BFloat16, Float16 };

struct Strip {
  int64_t b, y, x;    // image, row and column of its first token
  int64_t window, position;  // where that token is: window 0..B·h·w, position 0..M² in the window
  int64_t tokens;     // how many of the M tokens are on the map
};

struct Windows {
  int64_t B, H, W, heads, d, M;

  HOST_DEVICE int64_t h() const { return (H + M - 1) / M; }
  HOST_DEVICE int64_t w() const { return (W + M - 1) / M; }
  HOST_DEVICE int64_t count() const { return B * h() * w(); }
  HOST_DEVICE int64_t strips() const { return count() * M; }
  HOST_DEVICE int64_t channels() const { return heads * d; }

  // Strips are numbered along the rows of the map: image, row, window in the row.
  HOST_DEVICE Strip strip(int64_t s) const {
    const int64_t row = s / w(), column = s % w();
    const int64_t b = row / (h() * M), y = row % (h() * M);
    const int64_t x = column * M, left = W - x < M ? W - x : M;
    return {b, y, x, (b * h() + y / M) * w() + column, y % M * M, y < H ? left : 0};
  }

  // Token (y, x) of image b in a (B, H, W, ...) tensor, counted in tokens.
  HOST_DEVICE int64_t token(int64_t b, int64_t y, int64_t x) const { return (b * H + y) * W + x; }

  // A token's d channels of one head in (3, windows, heads, M², d), counted in groups of d; `third` is 0 for Q, 1 K, 2 V.
  HOST_DEVICE int64_t group(int64_t third, int64_t window, int64_t head, int64_t position) const {
    return ((third * count() + window) * heads + head) * M * M + position;
  }
};

// Attention's output z (windows, heads, M², d): SDPA lays it out differently from device to device.
struct Strides {
  int64_t window, head, position;
};
