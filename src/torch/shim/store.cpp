// The key-value store of PyTorch's distributed runtime (c10d), for `store.rs`.

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "caught.h"

#include <chrono>
#include <cstdlib>
#include <cstring>

namespace {

using Store = c10::intrusive_ptr<c10d::TCPStore>;

}  // namespace

using ovchat::caught;

extern "C" {

/// Connects to the store at `host` and `port`, for at most `seconds`. If `listener` is not -1, first
/// serves it on this listening socket, which it takes over.
char* ovchat_store_open(void** out, const char* host, uint16_t port, int listener, int64_t seconds) {
  return caught([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = listener >= 0;
    if (listener >= 0) options.masterListenFd = listener;
    options.waitWorkers = false;
    options.timeout = std::chrono::seconds(seconds);
    *out = new Store(c10::make_intrusive<c10d::TCPStore>(host, options));
  });
}

void ovchat_store_close(void* store) { delete static_cast<Store*>(store); }

char* ovchat_store_add(void* store, const char* key, int64_t by, int64_t* sum) {
  return caught([&] { *sum = (*static_cast<Store*>(store))->add(key, by); });
}

/// Sets a value. The store does not acknowledge it; that it answers the next question shows that it has it.
char* ovchat_store_set(void* store, const char* key, const uint8_t* value, size_t size) {
  return caught([&] {
    auto& own = *static_cast<Store*>(store);
    own->set(key, {value, value + size});
    TORCH_CHECK(own->check({key}), "a value was not set");
  });
}

/// Reads a value, which the caller gives to `ovchat_free`; leaves `value` alone if it was not set yet.
char* ovchat_store_get(void* store, const char* key, uint8_t** value, size_t* size) {
  return caught([&] {
    auto& own = *static_cast<Store*>(store);
    if (!own->check({key})) return;
    const auto found = own->get(key);
    *value = static_cast<uint8_t*>(malloc(found.size() + 1));
    TORCH_CHECK(*value != nullptr, "out of memory");
    memcpy(*value, found.data(), found.size());
    *size = found.size();
  });
}
}
