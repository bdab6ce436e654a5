// Passes over channels_last tensors for which torch has no fast or no right kernel on a CPU.
//
// Compiled once for float32 and once, with -DBFLOAT16, for bfloat16. Tensors are rows × channels: a row is one pixel of
// one image. Sums are kept in float32 within a chunk of rows and in float64 over the chunks, in a fixed order: results
// do not depend on the number of threads.

#include <cmath>

#include "vectors.h"

namespace {

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

// Weights (channels, 3, 3) as taps × padded values, of which there is one for each channel of one or more pixels;
// reversed for the gradient of the input.
std::vector<float> by_tap(const float* weight, int64_t channels, int64_t values, bool reversed) {
  std::vector<float> taps(TAPS * padded(values));
  for (int64_t v = 0; v < values; v++)
    for (int64_t t = 0; t < TAPS; t++)
      taps[(reversed ? TAPS - 1 - t : t) * padded(values) + place(v)] = weight[v % channels * TAPS + t];
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

// Images of few channels, such as a network's input, would leave most lanes of a vector empty. A row of their pixels is
// taken as one row of values instead: what a tap reads of it is the row of another line, shifted, and a frame of zeros
// around the image makes that true at its margins.
struct Narrow {
  int64_t height, values, shift, pitch, dilation;
  std::vector<T> framed;

  static bool fits(int64_t channels) { return channels < LANES / 2; }
  Narrow(int64_t height, int64_t width, int64_t channels, int64_t dilation)
      : height(height), values(width * channels), shift(dilation * channels), pitch(values + 2 * shift),
        dilation(dilation), framed((height + 2 * dilation) * pitch) {}
  void take(const T* image) {
    for (int64_t h = 0; h < height; h++)
      memcpy(&framed[(h + dilation) * pitch + shift], image + h * values, sizeof(T) * values);
  }
  // What tap t reads for the values of line h from v on.
  const T* tap(int64_t t, int64_t h, int64_t v) const {
    return &framed[(h + t / 3 * dilation) * pitch + t % 3 * shift + v];
  }
};

void narrow_depthwise(const T* x, const float* weight, const float* bias, T* y, int64_t images, int64_t channels,
                      const Narrow& shape, bool reversed, int threads) {
  int64_t values = shape.values, size = shape.height * values;
  auto taps = by_tap(weight, channels, values, reversed);
  auto start = arranged(values, [&](int64_t v) { return bias ? bias[v % channels] : 0; });
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t image = 0; image < images; image++) {
    Narrow narrow = shape;
    narrow.take(x + image * size);
    for (int64_t h = 0; h < narrow.height; h++)
      each_block(values, [&](int64_t v, auto n) {
        Pair sum = halves(&start[v]);
        for (int64_t t = 0; t < TAPS; t++)
          sum = sum + halves(&taps[t * padded(values) + v]) * load(narrow.tap(t, h, v), n);
        store(y + image * size + h * values + v, sum, n);
      });
  }
}

// Sums over the lines of each image, as partial[image][taps and bias][padded values].
std::vector<float> narrow_depthwise_weight(const T* x, const T* dy, int64_t images, const Narrow& shape, int threads) {
  int64_t values = shape.values, size = shape.height * values;
  std::vector<float> partial(images * (TAPS + 1) * padded(values));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t image = 0; image < images; image++) {
    Narrow narrow = shape;
    narrow.take(x + image * size);
    each_block(values, [&](int64_t v, auto n) {
      Pair sum[TAPS + 1] = {};
      for (int64_t h = 0; h < narrow.height; h++) {
        Pair g = load(dy + image * size + h * values + v, n);
        sum[TAPS] = sum[TAPS] + g;
        for (int64_t t = 0; t < TAPS; t++) sum[t] = sum[t] + g * load(narrow.tap(t, h, v), n);
      }
      for (int64_t t = 0; t <= TAPS; t++)
        memcpy(&partial[(image * (TAPS + 1) + t) * padded(values) + v], &sum[t], sizeof sum[t]);
    });
  }
  return partial;
}

// As the above, partial[image][taps and bias][padded channels].
std::vector<float> wide_depthwise_weight(const T* x, const T* dy, int64_t images, int64_t height, int64_t width,
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
  return partial;
}

}  // namespace

extern "C" {

// Mean and biased variance of each channel. Sums of a chunk are of x less the chunk's first row, so that a large mean
// costs no digits; chunks are merged as in Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
void moments(const T* x, int64_t rows, int64_t channels, double* mean, double* variance, int threads) {
  auto partial = two_sums(rows, channels, threads, [&](Pair* sums, int64_t from, int64_t to, int64_t c, auto n) {
    Pair shift = load(x + from / CHUNK_ROWS * CHUNK_ROWS * channels + c, n);
    for (int64_t r = from; r < to; r++) {
      Pair v = load(x + r * channels + c, n) - shift;
      sums[0] = sums[0] + v;
      sums[1] = sums[1] + v * v;
    }
  });
  int64_t width = padded(channels);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < channels; c++) {
    double count = 0, merged = 0, squares = 0;
    for (int64_t chunk = 0; chunk < chunks_of(rows); chunk++) {
      int64_t first = chunk * CHUNK_ROWS;
      double n = rows - first < CHUNK_ROWS ? rows - first : CHUNK_ROWS;
      const float* part = &partial[2 * chunk * width + place(c)];
      double sum = part[0], own = part[width] - sum * sum / n;
      double delta = load(x + first * channels + c, 1).a[0] + sum / n - merged;
      merged += delta * n / (count + n);
      squares += own + delta * delta * count * n / (count + n);
      count += n;
    }
    mean[c] = merged;
    variance[c] = squares < 0 ? 0 : squares / rows;
  }
}

// Takes the moments of `count` values into running statistics, the variance as an unbiased one.
void take_moments(const double* mean, const double* variance, double count, double momentum, float* running_mean,
                  float* running_variance, int64_t channels, int) {
  for (int64_t c = 0; c < channels; c++) {
    running_mean[c] += (float)(momentum * (mean[c] - running_mean[c]));
    running_variance[c] += (float)(momentum * (variance[c] * (count / (count - 1)) - running_variance[c]));
  }
}

// y = keep · max(0, (x - mean) / √(variance + eps) · weight + bias) · scale
void norm_relu_drop(const T* x, T* y, const float* weight, const float* bias, const double* mean,
                    const double* variance, double eps, int64_t rows, int64_t channels, uint64_t key,
                    uint32_t threshold, int threads) {
  auto slope = [&](int64_t c) { return weight[c] / std::sqrt(variance[c] + eps); };
  auto slopes = arranged(channels, slope);
  auto offsets = arranged(channels, [&](int64_t c) { return bias[c] - mean[c] * slope(c); });
  each_chunk(rows, threads, [&](int64_t chunk, int64_t first, int64_t last) {
    Dropout dropout(key, threshold, channels, chunk);
    for (int64_t r = first; r < last; r++)
      each_block(channels, [&](int64_t c, auto n) {
        Pair v = relu(load(x + r * channels + c, n) * halves(&slopes[c]) + halves(&offsets[c]));
        store(y + r * channels + c, threshold ? dropout(v, r - first, c) : v, n);
      });
  });
}

// Σg and Σg · (x - mean) / √(variance + eps) of each channel, for g the gradient behind ReLU and dropout.
void norm_relu_drop_sums(const T* dy, const T* y, const T* x, const double* mean, const double* variance, double eps,
                         int64_t rows, int64_t channels, float scale, double* sums, int threads) {
  auto means = arranged(channels, [&](int64_t c) { return mean[c]; });
  auto partial = two_sums(rows, channels, threads, [&](Pair* sums, int64_t from, int64_t to, int64_t c, auto n) {
    Pair centre = halves(&means[c]);
    for (int64_t r = from; r < to; r++) {
      Pair g = through(dy, y, r * channels + c, n, scale);
      sums[0] = sums[0] + g;
      sums[1] = sums[1] + g * (load(x + r * channels + c, n) - centre);
    }
  });
  add_up(partial, chunks_of(rows), 2, channels, sums, threads);
  for (int64_t c = 0; c < channels; c++) sums[channels + c] /= std::sqrt(variance[c] + eps);
}

// dx = slope · (g - Σg / count - x̂ · Σ(g · x̂) / count), as slope · g + factor · x + constant
void norm_relu_drop_backward(const T* dy, const T* y, const T* x, T* dx, const float* weight, const double* mean,
                             const double* variance, double eps, const double* sums, double count, int64_t rows,
                             int64_t channels, float scale, int threads) {
  auto deviation = [&](int64_t c) { return std::sqrt(variance[c] + eps); };
  auto factor = [&](int64_t c) { return -weight[c] / (variance[c] + eps) * sums[channels + c] / count; };
  auto slopes = arranged(channels, [&](int64_t c) { return weight[c] / deviation(c); });
  auto factors = arranged(channels, factor);
  auto constants = arranged(
      channels, [&](int64_t c) { return -weight[c] / deviation(c) * sums[c] / count - factor(c) * mean[c]; });
  each_chunk(rows, threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++)
      each_block(channels, [&](int64_t c, auto n) {
        int64_t at = r * channels + c;
        Pair g = through(dy, y, at, n, scale);
        store(dx + at, g * halves(&slopes[c]) + (load(x + at, n) * halves(&factors[c]) + halves(&constants[c])), n);
      });
  });
}

// Depthwise 3×3 convolution of any dilation, padding = dilation; `reversed` is the gradient of its input.
void depthwise(const T* x, const float* weight, const float* bias, T* y, int64_t images, int64_t height, int64_t width,
               int64_t channels, int64_t dilation, int reversed, int threads) {
  if (Narrow::fits(channels))
    return narrow_depthwise(x, weight, bias, y, images, channels, {height, width, channels, dilation}, reversed,
                            threads);
  auto taps = by_tap(weight, channels, channels, reversed);
  auto start = arranged(channels, [&](int64_t c) { return bias ? bias[c] : 0; });
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

// Gradients of weight (channels, 3, 3) and bias (channels,): sums over an image in float32, over images in float64.
void depthwise_weight(const T* x, const T* dy, float* dweight, float* dbias, int64_t images, int64_t height,
                      int64_t width, int64_t channels, int64_t dilation, int threads) {
  bool narrow = Narrow::fits(channels);
  int64_t values = narrow ? width * channels : channels;
  auto partial = narrow ? narrow_depthwise_weight(x, dy, images, {height, width, channels, dilation}, threads)
                        : wide_depthwise_weight(x, dy, images, height, width, channels, dilation, threads);
  std::vector<double> sums((TAPS + 1) * values);
  add_up(partial, images, TAPS + 1, values, sums.data(), threads);
  for (int64_t t = 0; t <= TAPS; t++)
    for (int64_t c = 0; c < channels; c++) {
      double sum = 0;
      for (int64_t v = c; v < values; v += channels) sum += sums[t * values + v];
      (t < TAPS ? dweight[c * TAPS + t] : dbias[c]) = (float)sum;
    }
}

}  // extern "C"
