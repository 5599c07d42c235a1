// Loops of attention on the CPU: products of a few rows with many, without packing them as BLAS does,
// and those of a softmax.
#pragma once

#include <cstdint>

namespace ovchat {

/// Queries, keys or values of one head: rows of `size` numbers.
struct Rows {
  const float* data;
  int64_t stride;
  int64_t count;
};

/// scores[i * keys.count + j] = scale * dot(queries[i], keys[j])
void dot_products(const Rows& queries, const Rows& keys, int64_t size, float scale, float* scores);

/// sums[i * stride + c] = the sum over j of shares[i * values.count + j] * values[j][c], for `count` rows
void weighted_sums(const float* shares, int64_t count, const Rows& values, int64_t size, float* sums,
                   int64_t stride);

/// Subtracts the largest of `count` numbers from all, and returns it.
float subtract_largest(float* numbers, int64_t count);

/// Returns the sum of `count` numbers.
float total(const float* numbers, int64_t count);

}  // namespace ovchat
