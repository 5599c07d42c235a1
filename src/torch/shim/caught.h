// The border to Rust, which no exception crosses.

#pragma once

#include <cstring>
#include <exception>

namespace ovchat {

/// Runs `compute`; returns null, or the message of its exception, which the caller frees.
template <class Compute>
char* caught(Compute compute) {
  try {
    compute();
    return nullptr;
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("an unknown C++ exception");
  }
}

}  // namespace ovchat
