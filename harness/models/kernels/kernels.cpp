// Passes over channels_last tensors for which torch has no fast or no right kernel on a CPU.
//
// Compiled once for float32 and once, with -DBFLOAT16, for bfloat16. Tensors are rows × channels: a row is one pixel of
// one image. Channels are taken by blocks of 32, as two vectors of 16. Sums are kept in float32 within a chunk of rows
// and in float64 over the chunks, in a fixed order: results do not depend on the number of threads. GCC's and Clang's
// vector extensions compile to whatever the processor has.

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

constexpr int64_t LANES = 16, BLOCK = 2 * LANES, CHUNK_ROWS = 256, TILE_ROWS = 4, TAPS = 9;

typedef float F __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

// The values of a block of channels. bfloat16 is split without moving lanes: `a` has the even channels, `b` the odd
// ones; of float32, `a` has the first half. `arranged` puts parameters into the same order.
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

#ifdef BFLOAT16
inline Pair unpack(const T* p) {
  U u;
  memcpy(&u, p, sizeof u);
  return {(F)(u << 16), (F)(u & 0xFFFF0000u)};
}

// To the nearest, ties to even, in the upper half; what is not a number stays so.
inline U rounded(F f) {
  U u = (U)f, near = u + 0x7FFF + ((u >> 16) & 1);
  return f == f ? near : u * 0 + 0x7FC00000u;
}

inline void pack(T* p, Pair v) {
  U u = (rounded(v.a) >> 16) | (rounded(v.b) & 0xFFFF0000u);
  memcpy(p, &u, sizeof u);
}

inline int64_t place(int64_t channel) { return channel / BLOCK * BLOCK + channel % 2 * LANES + channel % BLOCK / 2; }
#else
inline Pair unpack(const T* p) { return halves(p); }
inline void pack(T* p, Pair v) { memcpy(p, &v, sizeof v); }
inline int64_t place(int64_t channel) { return channel; }
#endif

// n values, the rest of the block 0. n is BLOCK at compile time in the loops that count.
inline Pair load(const T* p, int64_t n) {
  if (n == BLOCK) return unpack(p);
  T values[BLOCK] = {};
  for (int64_t i = 0; i < n; i++) values[i] = p[i];
  return unpack(values);
}

inline void store(T* p, Pair v, int64_t n) {
  if (n == BLOCK) return pack(p, v);
  T values[BLOCK];
  pack(values, v);
  for (int64_t i = 0; i < n; i++) p[i] = values[i];
}

inline int64_t padded(int64_t channels) { return (channels + BLOCK - 1) / BLOCK * BLOCK; }

std::vector<float> arranged(const float* values, int64_t channels) {
  std::vector<float> result(padded(channels));
  for (int64_t c = 0; c < channels; c++) result[place(c)] = values[c];
  return result;
}

// Calls body(first channel, number of channels) for each block; the number is a constant where the block is full.
template <typename Body>
inline void each_block(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + BLOCK <= channels; c += BLOCK) body(c, std::integral_constant<int64_t, BLOCK>{});
  if (c < channels) body(c, channels - c);
}

inline int64_t chunks_of(int64_t rows) { return (rows + CHUNK_ROWS - 1) / CHUNK_ROWS; }

template <typename Body>
inline void each_chunk(int64_t rows, int threads, const Body& body) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < chunks_of(rows); chunk++) {
    int64_t first = chunk * CHUNK_ROWS, last = first + CHUNK_ROWS;
    body(chunk, first, last < rows ? last : rows);
  }
}

// As each_chunk, by blocks of channels: body(sums, from row, to row, channel, n) adds to two sums of the chunk. A few rows
// at a time, so that memory is read in its order.
template <typename Body>
std::vector<float> two_sums(int64_t rows, int64_t channels, int threads, const Body& body) {
  int64_t width = padded(channels);
  std::vector<float> partial(chunks_of(rows) * 2 * width);
  each_chunk(rows, threads, [&](int64_t chunk, int64_t first, int64_t last) {
    for (int64_t from = first; from < last; from += TILE_ROWS) {
      each_block(channels, [&](int64_t c, auto n) {
        float *one = &partial[2 * chunk * width + c], *other = one + width;
        Pair sums[2] = {halves(one), halves(other)};
        body(sums, from, from + TILE_ROWS < last ? from + TILE_ROWS : last, c, n);
        memcpy(one, &sums[0], sizeof sums[0]);
        memcpy(other, &sums[1], sizeof sums[1]);
      });
    }
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

// SplitMix64's finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// 32 random bits a lane for a counter, keyed by two words: the rounds of Wellons' triple32 with the second key between.
inline U random_words(U counter, uint32_t key, uint32_t second_key) {
  U x = counter + key;
  x ^= x >> 17;
  x *= 0xED5AD4BBu;
  x ^= (x >> 11) ^ second_key;
  x *= 0xAC4C1B51u;
  x ^= x >> 15;
  x *= 0x31848BABu;
  return x ^ (x >> 14);
}

// Which of a chunk's values are kept: 16 random bits decide each.
struct Dropout {
  uint32_t threshold, words_a_row, first, second;
  float scale;
  U lane;

  // Of 2^16 values of the random bits, those below the threshold drop.
  Dropout(uint64_t key, uint32_t threshold, int64_t channels, int64_t chunk)
      : threshold(threshold), words_a_row(padded(channels) / 2), scale(65536.0f / (65536 - threshold)) {
    uint64_t z = mix64(key + 0x9E3779B97F4A7C15ull * (uint64_t)(chunk + 1));
    first = (uint32_t)z;
    second = (uint32_t)(z >> 32);
    for (uint32_t i = 0; i < LANES; i++) lane[i] = i;
  }
  Pair operator()(Pair v, int64_t row_of_chunk, int64_t channel) const {
    uint32_t start = (uint32_t)row_of_chunk * words_a_row + (uint32_t)channel / 2;
    U words = random_words(lane + start, first, second);
    F zero = {};
    return {(words & 0xFFFF) >= threshold ? v.a * scale : zero, (words >> 16) >= threshold ? v.b * scale : zero};
  }
};

inline Pair relu(Pair v) {
  F zero = {};
  return {v.a < 0 ? zero : v.a, v.b < 0 ? zero : v.b};  // what is not a number stays so
}

// The gradient behind ReLU and dropout: both let it through exactly where y is not 0.
inline Pair through(const T* dy, const T* y, int64_t at, int64_t n, float scale) {
  Pair passed = load(y + at, n), g = load(dy + at, n);
  F zero = {};
  return {passed.a != 0 ? g.a * scale : zero, passed.b != 0 ? g.b * scale : zero};
}

// Weights (channels, 3, 3) as taps × padded channels; reversed for the gradient of the input.
std::vector<float> by_tap(const float* weight, int64_t channels, bool reversed) {
  std::vector<float> taps(TAPS * padded(channels));
  for (int64_t c = 0; c < channels; c++)
    for (int64_t t = 0; t < TAPS; t++)
      taps[(reversed ? TAPS - 1 - t : t) * padded(channels) + place(c)] = weight[c * TAPS + t];
  return taps;
}

// The three rows of pixels that row h of an image's output reads; zeros beyond the image.
struct Rows {
  const T* row[3];
  Rows(const T* image, const T* zeros, int64_t h, int64_t height, int64_t pitch, int64_t dilation) {
    for (int64_t i = 0; i < 3; i++) {
      int64_t at = h + (i - 1) * dilation;
      row[i] = at < 0 || at >= height ? zeros : image + at * pitch;
    }
  }
};

// Calls body(pixel, first tap column, end of tap columns) for a row of pixels; constants between the margins.
template <typename Body>
inline void each_pixel(int64_t width, int64_t dilation, const Body& body) {
  typedef std::integral_constant<int64_t, 0> None;
  typedef std::integral_constant<int64_t, 3> All;
  int64_t p = 0;
  for (; p < width && p < dilation; p++) body(p, 1, p + dilation < width ? 3 : 2);
  for (; p < width - dilation; p++) body(p, None{}, All{});
  for (; p < width; p++) body(p, 0, 2);
}

}  // namespace

extern "C" {

// Mean and biased variance of each channel; sums are of x less the first row, so that a large mean costs no digits.
void moments(const T* x, int64_t rows, int64_t channels, double* mean, double* variance, int threads) {
  auto partial = two_sums(rows, channels, threads, [&](Pair* sums, int64_t from, int64_t to, int64_t c, auto n) {
    Pair shift = load(x + c, n);
    for (int64_t r = from; r < to; r++) {
      Pair v = load(x + r * channels + c, n) - shift;
      sums[0] = sums[0] + v;
      sums[1] = sums[1] + v * v;
    }
  });
  std::vector<double> sums(2 * channels);
  add_up(partial, chunks_of(rows), 2, channels, sums.data(), threads);
  for (int64_t c = 0; c < channels; c++) {
    double offset = sums[c] / rows, v = sums[channels + c] / rows - offset * offset;
    mean[c] = load(x + c, 1).a[0] + offset;
    variance[c] = v < 0 ? 0 : v;
  }
}

// y = keep · max(0, x · slope + offset) · scale
void norm_relu_drop(const T* x, T* y, const float* slope, const float* offset, int64_t rows, int64_t channels,
                    uint64_t key, uint32_t threshold, int threads) {
  std::vector<float> slopes = arranged(slope, channels), offsets = arranged(offset, channels);
  each_chunk(rows, threads, [&](int64_t chunk, int64_t first, int64_t last) {
    Dropout dropout(key, threshold, channels, chunk);
    for (int64_t r = first; r < last; r++) {
      each_block(channels, [&](int64_t c, auto n) {
        Pair v = relu(load(x + r * channels + c, n) * halves(&slopes[c]) + halves(&offsets[c]));
        store(y + r * channels + c, threshold ? dropout(v, r - first, c) : v, n);
      });
    }
  });
}

// Σg and Σg · (x - mean) of each channel, for g the gradient behind ReLU and dropout.
void norm_relu_drop_sums(const T* dy, const T* y, const T* x, const float* mean, int64_t rows, int64_t channels,
                         float scale, double* sums, int threads) {
  std::vector<float> means = arranged(mean, channels);
  auto partial = two_sums(rows, channels, threads, [&](Pair* sums, int64_t from, int64_t to, int64_t c, auto n) {
    Pair centre = halves(&means[c]);
    for (int64_t r = from; r < to; r++) {
      Pair g = through(dy, y, r * channels + c, n, scale);
      sums[0] = sums[0] + g;
      sums[1] = sums[1] + g * (load(x + r * channels + c, n) - centre);
    }
  });
  add_up(partial, chunks_of(rows), 2, channels, sums, threads);
}

// dx = slope · g + factor · x + constant
void norm_relu_drop_backward(const T* dy, const T* y, const T* x, T* dx, const float* slope, const float* factor,
                             const float* constant, int64_t rows, int64_t channels, float scale, int threads) {
  std::vector<float> slopes = arranged(slope, channels), factors = arranged(factor, channels),
                     constants = arranged(constant, channels);
  each_chunk(rows, threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      each_block(channels, [&](int64_t c, auto n) {
        int64_t at = r * channels + c;
        Pair g = through(dy, y, at, n, scale);
        store(dx + at, g * halves(&slopes[c]) + (load(x + at, n) * halves(&factors[c]) + halves(&constants[c])), n);
      });
    }
  });
}

// Depthwise 3×3 convolution of any dilation, padding = dilation; `reversed` is the gradient of its input.
void depthwise(const T* x, const float* weight, const float* bias, T* y, int64_t images, int64_t height, int64_t width,
               int64_t channels, int64_t dilation, int reversed, int threads) {
  std::vector<float> taps = by_tap(weight, channels, reversed), start(padded(channels));
  if (bias) start = arranged(bias, channels);
  int64_t pitch = width * channels;
  std::vector<T> zeros(pitch);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t line = 0; line < images * height; line++) {
    Rows rows(x + line / height * height * pitch, zeros.data(), line % height, height, pitch, dilation);
    each_block(channels, [&](int64_t c, auto n) {
      Pair w[TAPS];
      for (int64_t t = 0; t < TAPS; t++) w[t] = halves(&taps[t * padded(channels) + c]);
      each_pixel(width, dilation, [&](int64_t p, auto begin, auto end) {
        Pair sum = halves(&start[c]);
        for (int64_t j = begin; j < end; j++)
          for (int64_t i = 0; i < 3; i++)
            sum = sum + w[3 * i + j] * load(rows.row[i] + (p + (j - 1) * dilation) * channels + c, n);
        store(y + line * pitch + p * channels + c, sum, n);
      });
    });
  }
}

// Gradients of weight (channels, 3, 3) and bias (channels,), as [tap][channels] with the bias last: sums over an image
// in float32, over images in float64.
void depthwise_weight(const T* x, const T* dy, double* sums, int64_t images, int64_t height, int64_t width,
                      int64_t channels, int64_t dilation, int threads) {
  int64_t padding = padded(channels), pitch = width * channels;
  std::vector<float> partial(images * (TAPS + 1) * padding);
  std::vector<T> zeros(pitch);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t image = 0; image < images; image++) {
    each_block(channels, [&](int64_t c, auto n) {
      Pair sum[TAPS + 1] = {};
      for (int64_t h = 0; h < height; h++) {
        Rows rows(x + image * height * pitch, zeros.data(), h, height, pitch, dilation);
        each_pixel(width, dilation, [&](int64_t p, auto begin, auto end) {
          Pair g = load(dy + (image * height + h) * pitch + p * channels + c, n);
          sum[TAPS] = sum[TAPS] + g;
          for (int64_t j = begin; j < end; j++)
            for (int64_t i = 0; i < 3; i++)
              sum[3 * i + j] = sum[3 * i + j] + g * load(rows.row[i] + (p + (j - 1) * dilation) * channels + c, n);
        });
      }
      for (int64_t t = 0; t <= TAPS; t++)
        memcpy(&partial[(image * (TAPS + 1) + t) * padding + c], &sum[t], sizeof sum[t]);
    });
  }
  add_up(partial, images, TAPS + 1, channels, sums, threads);
}

}  // extern "C"
