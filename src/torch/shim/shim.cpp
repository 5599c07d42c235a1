// Operators that libtorch has, or lets one build, but `tch` does not offer.
//
// They are registered as `ovchat::…`, with one kernel for each kind of device, so that libtorch's
// dispatcher chooses, and its profilers name them. `shim.rs` calls them through the C functions at
// the end. Only libtorch_cpu and c10 are linked: CUDA kernels are reached through the dispatcher.

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "caught.h"
#include "kernels.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

// A function of MKL, which x86 builds of libtorch contain and export.
extern "C" {
__attribute__((weak)) void vsExp(const int n, const float* a, float* y);
}

namespace {

using at::Tensor;

/// Sequences of queries, each of which sees a range of keys.
struct Sequences {
  const int* q_starts;   // [sequences + 1]
  const int* k_starts;   // [sequences + 1], the last of which is not used
  const int* k_lengths;  // [sequences]
  int64_t count;
};

void check_sequences(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_starts,
                     const Tensor& k_starts, const Tensor& k_lengths) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.sizes() == k.sizes() && q.size(1) == k.size(1) &&
                  q.size(2) == k.size(2),
              "attend_varlen: queries ", q.sizes(), ", keys ", k.sizes(), ", values ", v.sizes());
  TORCH_CHECK(q.stride(2) == 1 && k.stride(2) == 1 && v.stride(2) == 1,
              "attend_varlen: the last dimension is not contiguous");
  for (const Tensor& numbers : {q_starts, k_starts, k_lengths}) {
    TORCH_CHECK(numbers.scalar_type() == at::kInt && numbers.is_contiguous(),
                "attend_varlen: starts and lengths are int32");
  }
  TORCH_CHECK(q_starts.numel() == k_lengths.numel() + 1 && k_starts.numel() == q_starts.numel(),
              "attend_varlen: ", q_starts.numel(), " starts of queries, ", k_starts.numel(),
              " of keys, ", k_lengths.numel(), " lengths");
}

// ---- The plain implementation, for any device and dtype ----

/// Attention sequence by sequence, in float32.
std::tuple<Tensor, Tensor> attend_plain(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const Tensor& q_starts, const Tensor& k_starts,
                                        const Tensor& k_lengths, int64_t, int64_t, double scale) {
  check_sequences(q, k, v, q_starts, k_starts, k_lengths);
  const Tensor q_first = q_starts.cpu(), k_first = k_starts.cpu(), lengths = k_lengths.cpu();
  const auto* q_at = q_first.const_data_ptr<int>();
  const auto* k_at = k_first.const_data_ptr<int>();
  const auto* k_count = lengths.const_data_ptr<int>();
  const auto options = q.options().dtype(at::kFloat);
  Tensor out = at::zeros(q.sizes(), q.options());
  Tensor lse = at::full({q.size(1), q.size(0)}, -std::numeric_limits<float>::infinity(), options);
  for (int64_t i = 0; i < lengths.numel(); i++) {
    const int64_t rows = q_at[i + 1] - q_at[i];
    if (rows == 0 || k_count[i] == 0) continue;
    const auto part = [](const Tensor& xs, int64_t start, int64_t length) {
      return xs.narrow(0, start, length).transpose(0, 1).to(at::kFloat);  // [heads, length, head_dim]
    };
    const Tensor scores = part(q, q_at[i], rows)
                              .matmul(part(k, k_at[i], k_count[i]).transpose(1, 2))
                              .mul(scale);  // [heads, rows, length]
    lse.narrow(1, q_at[i], rows).copy_(scores.logsumexp(2));
    const Tensor mixed = scores.softmax(2).matmul(part(v, k_at[i], k_count[i]));
    out.narrow(0, q_at[i], rows).copy_(mixed.transpose(0, 1));
  }
  return {out, lse};
}

// ---- The CPU ----

void exponentials(float* xs, int count) {
  if (vsExp != nullptr) {
    vsExp(count, xs, xs);
  } else {
    for (int i = 0; i < count; i++) xs[i] = std::exp(xs[i]);
  }
}

/// Attention in float32: for each sequence and head, products with a softmax between.
std::tuple<Tensor, Tensor> attend_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& q_starts, const Tensor& k_starts,
                                      const Tensor& k_lengths, int64_t q_max, int64_t k_max,
                                      double scale) {
  if (q.scalar_type() != at::kFloat || k.scalar_type() != at::kFloat || v.scalar_type() != at::kFloat) {
    return attend_plain(q, k, v, q_starts, k_starts, k_lengths, q_max, k_max, scale);
  }
  check_sequences(q, k, v, q_starts, k_starts, k_lengths);
  const int64_t heads = q.size(1), size = q.size(2), tokens = q.size(0);
  Tensor out = at::empty({tokens, heads, size}, q.options());
  Tensor lse = at::empty({heads, tokens}, q.options());
  const Sequences all = {q_starts.const_data_ptr<int>(), k_starts.const_data_ptr<int>(),
                         k_lengths.const_data_ptr<int>(), k_lengths.numel()};
  for (int64_t i = 0; i < all.count; i++) {
    TORCH_CHECK(all.q_starts[i] >= 0 && all.q_starts[i] <= all.q_starts[i + 1] &&
                    all.q_starts[i + 1] <= tokens && all.q_starts[i + 1] - all.q_starts[i] <= q_max &&
                    all.k_starts[i] >= 0 && all.k_lengths[i] > 0 && all.k_lengths[i] <= k_max &&
                    all.k_starts[i] + static_cast<int64_t>(all.k_lengths[i]) <= k.size(0),
                "attend_varlen: sequence ", i, " is out of bounds");
  }
  const auto* q_data = q.const_data_ptr<float>();
  const auto* k_data = k.const_data_ptr<float>();
  const auto* v_data = v.const_data_ptr<float>();
  auto* out_data = out.mutable_data_ptr<float>();
  auto* lse_data = lse.mutable_data_ptr<float>();
  // Below some 100,000 multiplications, waking another thread takes longer than they do.
  const int64_t grain = std::max<int64_t>(1, 100'000 / std::max<int64_t>(1, q_max * k_max * size));
  at::parallel_for(0, all.count * heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(q_max * k_max);
    for (int64_t task = begin; task < end; task++) {
      const int64_t i = task / heads, head = task % heads;
      const int64_t first = all.q_starts[i];
      const int rows = all.q_starts[i + 1] - all.q_starts[i], length = all.k_lengths[i];
      if (rows == 0) continue;
      const auto strided = [&](const Tensor& xs, const float* data, int64_t start) {
        return data + start * xs.stride(0) + head * xs.stride(1);
      };
      const auto of = [&](const Tensor& xs, const float* data, int64_t start, int64_t count) {
        return ovchat::Rows{strided(xs, data, start), xs.stride(0), count};
      };
      const auto queries = of(q, q_data, first, rows);
      const auto keys = of(k, k_data, all.k_starts[i], length);
      const auto values = of(v, v_data, all.k_starts[i], length);
      ovchat::dot_products(queries, keys, size, scale, scores.data());
      for (int row = 0; row < rows; row++) {
        float* own = scores.data() + static_cast<int64_t>(row) * length;
        lse_data[head * tokens + first + row] = ovchat::subtract_largest(own, length);
      }
      exponentials(scores.data(), rows * length);
      float* mixed = out_data + (first * heads + head) * size;
      ovchat::weighted_sums(scores.data(), rows, values, size, mixed, heads * size);
      for (int row = 0; row < rows; row++) {
        const float sum = ovchat::total(scores.data() + static_cast<int64_t>(row) * length, length);
        lse_data[head * tokens + first + row] += std::log(sum);
        float* values_of = mixed + static_cast<int64_t>(row) * heads * size;
        const float inverse = 1 / sum;
        for (int64_t j = 0; j < size; j++) values_of[j] *= inverse;
      }
    }
  });
  return {out, lse};
}

// ---- CUDA ----

/// FlashAttention for 16-bit types and the head sizes that it takes.
std::tuple<Tensor, Tensor> attend_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& q_starts, const Tensor& k_starts,
                                       const Tensor& k_lengths, int64_t q_max, int64_t k_max,
                                       double scale) {
  static std::atomic<bool> has_flash = true;
  const bool is_half = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const auto plain = [&] {
    return attend_plain(q, k, v, q_starts, k_starts, k_lengths, q_max, k_max, scale);
  };
  if (!is_half || q.size(2) % 8 != 0 || q.size(2) > 256 || !has_flash) return plain();
  check_sequences(q, k, v, q_starts, k_starts, k_lengths);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> found;
  try {
    found = at::_ops::_flash_attention_forward::call(
        q, k, v, q_starts, k_starts, q_max, k_max, /*dropout_p=*/0.0, /*is_causal=*/false,
        /*return_debug_mask=*/false, scale, std::nullopt, std::nullopt, k_lengths, std::nullopt);
  } catch (const c10::Error& error) {
    // "FlashAttention only supports Ampere GPUs or newer."
    if (std::string(error.what()).find("Ampere") == std::string::npos) throw;
    has_flash = false;
    return plain();
  }
  Tensor lse = std::get<1>(found);
  TORCH_CHECK(lse.dim() == 2 && lse.size(0) == q.size(1) && lse.size(1) == q.size(0),
              "attend_varlen: FlashAttention returns log-sum-exps of shape ", lse.sizes());
  return {std::get<0>(found), lse};
}

// ---- Attention of a decode step ----

using Varlen = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                          const Tensor&, const Tensor&, int64_t, int64_t, double);
using Pieces = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                      int64_t);

template <class Signature>
c10::TypedOperatorHandle<Signature> operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// Attention of one token of each row to keys in pieces, which are attended to apart and merged by
/// their log-sum-exps (FlashDecoding). See `attend_pieces` in shim.rs for the shapes.
Tensor attend_pieces(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& entries,
                     const Tensor& pieces, const std::optional<Tensor>& mask, const Tensor& q_starts,
                     const Tensor& k_starts, const Tensor& k_lengths, int64_t q_max, int64_t k_max) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && pieces.dim() == 2 && pieces.size(0) == q.size(1) &&
                  q.size(0) % k.size(0) == 0,
              "attend_pieces: queries ", q.sizes(), ", keys ", k.sizes(), ", pieces ", pieces.sizes());
  const int64_t heads = q.size(0), rows = q.size(1), shared = k.size(0), most = pieces.size(1);
  const int64_t group = heads / shared, count = entries.numel();
  // The query heads that share a head of keys are queries of one sequence.
  const Tensor asked = q.transpose(0, 1)
                           .unflatten(1, {shared, group})
                           .transpose(1, 2)
                           .index_select(0, entries)
                           .flatten(0, 1);  // [entries * group, kv_heads, head_dim]
  static const auto attend = operator_of<Varlen>("ovchat::attend_varlen");
  const auto [out, lse] = attend.call(asked, k.transpose(0, 1), v.transpose(0, 1), q_starts, k_starts,
                                      k_lengths, q_max, k_max, 1 / std::sqrt(q.size(2)));
  const Tensor flat = pieces.flatten();
  Tensor weights = lse.unflatten(1, {count, group}).index_select(1, flat).unflatten(1, {rows, most});
  if (mask.has_value()) weights = weights + *mask;  // [kv_heads, rows, pieces, group]
  weights = weights.softmax(2).permute({1, 2, 0, 3}).unsqueeze(-1);
  const Tensor mixed = out.unflatten(0, {count, group})
                           .index_select(0, flat)
                           .unflatten(0, {rows, most})
                           .transpose(2, 3);  // [rows, pieces, kv_heads, group, head_dim]
  return (mixed * weights).sum(1).to(q.scalar_type()).flatten(1, 2).transpose(0, 1);
}

TORCH_LIBRARY(ovchat, library) {
  const char* arguments =
      "(Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor k_starts, Tensor k_lengths, int q_max, "
      "int k_max, float scale) -> (Tensor, Tensor)";
  library.def((std::string("attend_varlen") + arguments).c_str());
  library.def((std::string("attend_varlen_plain") + arguments).c_str());
  library.def(
      "attend_pieces(Tensor q, Tensor k, Tensor v, Tensor entries, Tensor pieces, Tensor? mask, Tensor "
      "q_starts, Tensor k_starts, Tensor k_lengths, int q_max, int k_max) -> Tensor");
}

TORCH_LIBRARY_IMPL(ovchat, CPU, library) { library.impl("attend_varlen", attend_cpu); }

TORCH_LIBRARY_IMPL(ovchat, CUDA, library) { library.impl("attend_varlen", attend_cuda); }

TORCH_LIBRARY_IMPL(ovchat, CompositeExplicitAutograd, library) {
  library.impl("attend_varlen_plain", attend_plain);
  library.impl("attend_pieces", attend_pieces);
}

// ---- Operators that are counted ----

thread_local int64_t depth = 0, outermost = 0, nested = 0;
at::CallbackHandle counting = 0;

std::unique_ptr<at::ObserverContext> entered(const at::RecordFunction&) {
  (depth++ == 0 ? outermost : nested)++;
  return nullptr;
}

void left(const at::RecordFunction&, at::ObserverContext*) { depth--; }

std::vector<Tensor> list_of(const Tensor* const* tensors, int64_t count) {
  std::vector<Tensor> list;
  list.reserve(count);
  for (int64_t i = 0; i < count; i++) list.push_back(*tensors[i]);
  return list;
}

}  // namespace

using ovchat::caught;

extern "C" {

void ovchat_free(char* message) { free(message); }

/// Calls `attend_varlen`, or `attend_varlen_plain`. `out` receives two tensors.
char* ovchat_attend_varlen(Tensor** out, bool plain, const Tensor* q, const Tensor* k, const Tensor* v,
                           const Tensor* q_starts, const Tensor* k_starts, const Tensor* k_lengths,
                           int64_t q_max, int64_t k_max, double scale) {
  return caught([&] {
    static const auto fast = operator_of<Varlen>("ovchat::attend_varlen");
    static const auto slow = operator_of<Varlen>("ovchat::attend_varlen_plain");
    auto found = (plain ? slow : fast)
                     .call(*q, *k, *v, *q_starts, *k_starts, *k_lengths, q_max, k_max, scale);
    out[0] = new Tensor(std::move(std::get<0>(found)));
    out[1] = new Tensor(std::move(std::get<1>(found)));
  });
}

/// Calls `attend_pieces`; `mask` may be null. `out` receives a tensor.
char* ovchat_attend_pieces(Tensor** out, const Tensor* q, const Tensor* k, const Tensor* v,
                           const Tensor* entries, const Tensor* pieces, const Tensor* mask,
                           const Tensor* q_starts, const Tensor* k_starts, const Tensor* k_lengths,
                           int64_t q_max, int64_t k_max) {
  return caught([&] {
    static const auto attend = operator_of<Pieces>("ovchat::attend_pieces");
    const auto some = mask == nullptr ? std::nullopt : std::optional<Tensor>(*mask);
    *out = new Tensor(attend.call(*q, *k, *v, *entries, *pieces, some, *q_starts, *k_starts, *k_lengths,
                                  q_max, k_max));
  });
}

/// Updates parameters by AdamW in one operator (`torch.optim.AdamW(fused=True)`). `tensors` has
/// `count` parameters, then as many gradients, means, mean squares and numbers of the update.
char* ovchat_fused_adamw(const Tensor* const* tensors, int64_t count, double rate, double beta1,
                         double beta2, double decay, double epsilon) {
  return caught([&] {
    std::vector<std::vector<Tensor>> lists(5);
    for (int64_t list = 0; list < 5; list++) lists[list] = list_of(tensors + list * count, count);
    at::_fused_adamw_(lists[0], lists[1], lists[2], lists[3], {}, lists[4], rate, beta1, beta2, decay,
                      epsilon, /*amsgrad=*/false, /*maximize=*/false);
  });
}

/// The Euclidean norm of all tensors together: `out` receives a scalar.
char* ovchat_norm(Tensor** out, const Tensor* const* tensors, int64_t count) {
  return caught([&] {
    const auto norms = at::_foreach_norm(list_of(tensors, count), 2);
    *out = new Tensor(at::stack(norms).norm());
  });
}

/// Multiplies all tensors by a number.
char* ovchat_scale(const Tensor* const* tensors, int64_t count, double factor) {
  return caught([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(list_of(tensors, count), factor);
  });
}

/// Reorders the weight of a linear layer for oneDNN. `out` receives a tensor, or null if this libtorch
/// has no such operator.
char* ovchat_pack(Tensor** out, const Tensor* weight) {
  return caught([&] {
    auto& operators = c10::Dispatcher::singleton();
    const auto reorder = operators.findSchema({"mkldnn::_reorder_linear_weight", ""});
    if (!reorder || !operators.findSchema({"mkldnn::_linear_pointwise", ""})) return;
    using Reorder = Tensor(const Tensor&, std::optional<c10::SymInt>);
    *out = new Tensor(reorder->typed<Reorder>().call(weight->contiguous(), std::nullopt));
  });
}

/// `xs weight^T + bias` with a reordered weight; `bias` may be null. `out` receives a tensor.
char* ovchat_packed_linear(Tensor** out, const Tensor* xs, const Tensor* weight, const Tensor* bias) {
  return caught([&] {
    using Linear = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                          c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
    static const auto linear = operator_of<Linear>("mkldnn::_linear_pointwise");
    const auto some = bias == nullptr ? std::nullopt : std::optional<Tensor>(*bias);
    const c10::List<std::optional<at::Scalar>> no_scalars;
    *out = new Tensor(linear.call(*xs, *weight, some, "none", no_scalars, ""));
  });
}

/// Gives memory that libtorch keeps for later back to the device.
char* ovchat_empty_cache() {
  return caught([] {
    if (at::hasCUDA()) at::accelerator::emptyCache();
  });
}

/// The largest memory that libtorch has held on all GPUs together, in bytes; `bytes` is left alone without
/// a GPU.
char* ovchat_peak_memory(int64_t* bytes) {
  return caught([&] {
    if (!at::hasCUDA()) return;
    int64_t sum = 0;
    for (c10::DeviceIndex device = 0; device < at::accelerator::deviceCount(); device++) {
      sum += at::accelerator::getDeviceStats(device).reserved_bytes[0].peak;  // 0: of all pools
    }
    *bytes = sum;
  });
}

/// Lets libtorch choose kernels whose results repeat to the bit on one kind of device, and warn where it
/// has none.
char* ovchat_deterministic() {
  return caught([] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(true, /*warn_only=*/true);
    context.setDeterministicCuDNN(true);
    // Nothing here reads what it has not written.
    context.setDeterministicFillUninitializedMemory(false);
  });
}

/// True after `ovchat_deterministic`.
bool ovchat_is_deterministic() { return at::globalContext().deterministicAlgorithms(); }

/// The attention backends that may be used: bits 0 to 3 are flash, memory-efficient, cuDNN and math.
int64_t ovchat_attention_backends() {
  const auto& context = at::globalContext();
  return context.userEnabledFlashSDP() | context.userEnabledMemEfficientSDP() << 1 |
         context.userEnabledCuDNNSDP() << 2 | context.userEnabledMathSDP() << 3;
}

/// Begins to count the operators that this thread calls.
char* ovchat_count_begin() {
  return caught([] {
    outermost = nested = 0;
    counting = at::addThreadLocalCallback(
        at::RecordFunctionCallback(entered, left).scopes({at::RecordScope::FUNCTION}));
  });
}

/// Ends counting: `counts` receives the outermost operators, and those that these call.
char* ovchat_count_end(int64_t* counts) {
  return caught([&] {
    at::removeCallback(counting);
    counts[0] = outermost;
    counts[1] = nested;
  });
}
}
