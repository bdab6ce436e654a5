// Rows × channels by vectors, for float32 or, with -DBFLOAT16, bfloat16.
//
// GCC's and Clang's vector extensions compile to whatever the processor has.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef BFLOAT16
typedef uint16_t T;
#else
typedef float T;
#endif

namespace {

constexpr int64_t LANES = 16, BLOCK = 2 * LANES, CHUNK_ROWS = 256, TILE_ROWS = 16, TAPS = 9;
typedef float F __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

// Channels are taken by blocks of 32, as two vectors of 16. bfloat16 is split without moving lanes: `a` has the even
// channels, `b` the odd ones; of float32, `a` has the first half. `arranged` puts parameters into the same order.
struct Pair {
  F a, b;
};

inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }

inline Pair halves(const float* p) {
  Pair v;
  memcpy(&v, p, sizeof v);
  return v;
}

// load: n values, the rest of the block 0. n is known at compile time in the loops that count.
#ifdef BFLOAT16
inline Pair load(const T* p, int64_t n) {
  U u = {};
  memcpy(&u, p, sizeof(T) * n);
  return {(F)(u << 16), (F)(u & 0xFFFF0000u)};
}

// To the nearest, ties to even, in the upper half; what is not a number stays so.
inline U rounded(F f) {
  U u = (U)f, near = u + 0x7FFF + ((u >> 16) & 1);
  return f == f ? near : u * 0 + 0x7FC00000u;
}

inline void store(T* p, Pair v, int64_t n) {
  U u = (rounded(v.a) >> 16) | (rounded(v.b) & 0xFFFF0000u);
  memcpy(p, &u, sizeof(T) * n);
}

inline int64_t place(int64_t channel) { return channel / BLOCK * BLOCK + channel % 2 * LANES + channel % BLOCK / 2; }
#else
inline Pair load(const T* p, int64_t n) {
  Pair v = {};
  memcpy(&v, p, sizeof(T) * n);
  return v;
}

inline void store(T* p, Pair v, int64_t n) { memcpy(p, &v, sizeof(T) * n); }
inline int64_t place(int64_t channel) { return channel; }
#endif

inline int64_t padded(int64_t channels) { return (channels + BLOCK - 1) / BLOCK * BLOCK; }

// value(channel) of each channel, in the order of Pair.
template <typename Value>
std::vector<float> arranged(int64_t channels, const Value& value) {
  std::vector<float> result(padded(channels));
  for (int64_t c = 0; c < channels; c++) result[place(c)] = (float)value(c);
  return result;
}

// Calls body(first channel, number of channels) for each block. The number is a constant for whole blocks and for
// widths that are multiples of 8.
template <typename Body>
inline void each_block(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + BLOCK <= channels; c += BLOCK) body(c, std::integral_constant<int64_t, BLOCK>{});
  switch (channels - c) {
    case 0: return;
    case 8: return body(c, std::integral_constant<int64_t, 8>{});
    case 16: return body(c, std::integral_constant<int64_t, 16>{});
    case 24: return body(c, std::integral_constant<int64_t, 24>{});
    default: return body(c, channels - c);
  }
}

inline int64_t chunks_of(int64_t rows) { return (rows + CHUNK_ROWS - 1) / CHUNK_ROWS; }

// Calls body(chunk, first row, end of rows) by several threads.
template <typename Body>
inline void each_chunk(int64_t rows, int threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks_of(rows); chunk++) {
    int64_t first = chunk * CHUNK_ROWS, last = first + CHUNK_ROWS;
    body(chunk, first, last < rows ? last : rows);
  }
}

// As each_chunk, by blocks of channels: body(sums, from row, to row, channel, n) adds to two sums of the chunk. A few
// rows at a time, so that memory is read in its order.
template <typename Body>
std::vector<float> two_sums(int64_t rows, int64_t channels, int threads, const Body& body) {
  int64_t width = padded(channels);
  std::vector<float> partial(chunks_of(rows) * 2 * width);
  each_chunk(rows, threads, [&](int64_t chunk, int64_t first, int64_t last) {
    for (int64_t from = first; from < last; from += TILE_ROWS)
      each_block(channels, [&](int64_t c, auto n) {
        float *one = &partial[2 * chunk * width + c], *other = one + width;
        Pair sums[2] = {halves(one), halves(other)};
        body(sums, from, from + TILE_ROWS < last ? from + TILE_ROWS : last, c, n);
        memcpy(one, &sums[0], sizeof sums[0]);
        memcpy(other, &sums[1], sizeof sums[1]);
      });
  });
  return partial;
}

// Sums over the parts of partial[part][set][padded channels], as sums[set][channels].
void add_up(const std::vector<float>& partial, int64_t parts, int64_t sets, int64_t channels, double* sums,
            int threads) {
  int64_t width = padded(channels), values = sets * width;
  std::vector<double> total(values);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t start = 0; start < values; start += BLOCK)
    for (int64_t part = 0; part < parts; part++)
      for (int64_t v = start; v < start + BLOCK; v++) total[v] += partial[part * values + v];
  for (int64_t set = 0; set < sets; set++)
    for (int64_t c = 0; c < channels; c++) sums[set * channels + c] = total[set * width + place(c)];
}

}  // namespace
