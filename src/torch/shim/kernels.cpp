// The loops of kernels.h, in vectors of 16 numbers. The compiler makes a version for each generation
// of processors, and the loader chooses (target_clones).

#include "kernels.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "fma", "default")))
#endif
#else
#define CLONES
#endif

namespace {

constexpr int LANES = 16;
using Vector = float __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));
using Places = int __attribute__((vector_size(LANES * sizeof(int))));

#define INLINE inline __attribute__((always_inline))

INLINE Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

INLINE void store(float* to, const Vector& vector) { std::memcpy(to, &vector, sizeof vector); }

/// Adds up each half (quarter, eighth, …) of two vectors: the sums of `a` come first, then those of `b`.
#ifdef __clang__
#define HALVES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HALVES(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

INLINE Vector add_8(Vector a, Vector b) {
  return HALVES(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         HALVES(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

INLINE Vector add_4(Vector a, Vector b) {
  return HALVES(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         HALVES(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

INLINE Vector add_2(Vector a, Vector b) {
  return HALVES(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         HALVES(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}

INLINE Vector add_1(Vector a, Vector b) {
  return HALVES(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         HALVES(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/// Returns the sum of each of 16 vectors.
INLINE Vector sums_of(const Vector* all) {
  Vector eight[8], four[4], two[2];
  for (int i = 0; i < 8; i++) eight[i] = add_8(all[2 * i], all[2 * i + 1]);
  for (int i = 0; i < 4; i++) four[i] = add_4(eight[2 * i], eight[2 * i + 1]);
  for (int i = 0; i < 2; i++) two[i] = add_2(four[2 * i], four[2 * i + 1]);
  return add_1(two[0], two[1]);
}

/// Adds to the sums of up to 4 rows in `CHUNKS` vectors of columns from `first` on.
template <int CHUNKS>
INLINE void sum_columns(const float* const shares[4], const ovchat::Rows& values, int64_t first,
                        float* const sums[4], int64_t rows) {
  Vector found[4][CHUNKS] = {};
  for (int64_t j = 0; j < values.count; j++) {
    const float* value = values.data + j * values.stride + first;
    Vector column[CHUNKS];
    for (int c = 0; c < CHUNKS; c++) column[c] = load(value + c * LANES);
    for (int i = 0; i < 4; i++) {
      for (int c = 0; c < CHUNKS; c++) found[i][c] += shares[i][j] * column[c];
    }
  }
  for (int64_t i = 0; i < rows; i++) {
    for (int c = 0; c < CHUNKS; c++) store(sums[i] + first + c * LANES, found[i][c]);
  }
}

}  // namespace

namespace ovchat {

CLONES void dot_products(const Rows& queries, const Rows& keys, int64_t size, float scale,
                         float* scores) {
  for (int64_t i = 0; i < queries.count; i += 4) {
    const int64_t rows = std::min<int64_t>(4, queries.count - i);
    const float* query[4];
    // Where there are fewer than four, the last one is computed again.
    for (int64_t r = 0; r < 4; r++) query[r] = queries.data + (i + std::min(r, rows - 1)) * queries.stride;
    for (int64_t j = 0; j < keys.count; j += 4) {
      const int64_t columns = std::min<int64_t>(4, keys.count - j);
      const float* key[4];
      for (int64_t k = 0; k < 4; k++) key[k] = keys.data + (j + std::min(k, columns - 1)) * keys.stride;
      Vector products[16] = {};
      for (int64_t c = 0; c + LANES <= size; c += LANES) {
        Vector k[4];
        for (int n = 0; n < 4; n++) k[n] = load(key[n] + c);
        for (int r = 0; r < 4; r++) {
          const Vector q = load(query[r] + c);
          for (int n = 0; n < 4; n++) products[4 * r + n] += q * k[n];
        }
      }
      float found[LANES];
      store(found, sums_of(products));
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t n = 0; n < columns; n++) {
          float product = found[4 * r + n];
          for (int64_t c = size / LANES * LANES; c < size; c++) product += query[r][c] * key[n][c];
          scores[(i + r) * keys.count + j + n] = product * scale;
        }
      }
    }
  }
}

CLONES void weighted_sums(const float* shares, int64_t count, const Rows& values, int64_t size,
                          float* sums, int64_t stride) {
  for (int64_t i = 0; i < count; i += 4) {
    const int64_t rows = std::min<int64_t>(4, count - i);
    const float* share[4];
    float* sum[4];
    for (int64_t r = 0; r < 4; r++) {
      const int64_t row = i + std::min(r, rows - 1);
      share[r] = shares + row * values.count;
      sum[r] = sums + row * stride;
    }
    int64_t first = 0;
    for (; first + 4 * LANES <= size; first += 4 * LANES) sum_columns<4>(share, values, first, sum, rows);
    for (; first + LANES <= size; first += LANES) sum_columns<1>(share, values, first, sum, rows);
    for (; first < size; first++) {
      for (int64_t r = 0; r < rows; r++) {
        float found = 0;
        for (int64_t j = 0; j < values.count; j++) found += share[r][j] * values.data[j * values.stride + first];
        sum[r][first] = found;
      }
    }
  }
}

CLONES float subtract_largest(float* numbers, int64_t count) {
  float largest = numbers[0];
  int64_t at = 0;
  if (count >= LANES) {
    Vector most = load(numbers);
    for (at = LANES; at + LANES <= count; at += LANES) {
      const Vector next = load(numbers + at);
      most = next > most ? next : most;
    }
    for (int i = 0; i < LANES; i++) largest = std::max(largest, most[i]);
  }
  for (; at < count; at++) largest = std::max(largest, numbers[at]);
  for (int64_t i = 0; i < count; i++) numbers[i] -= largest;
  return largest;
}

CLONES float total(const float* numbers, int64_t count) {
  Vector sums = {};
  int64_t at = 0;
  for (; at + LANES <= count; at += LANES) sums += load(numbers + at);
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += sums[i];
  for (; at < count; at++) sum += numbers[at];
  return sum;
}

}  // namespace ovchat
