// Scratch memory in pieces.
#pragma once

#include "isa/product/panels.h"

namespace hyperfast::HF_ISA {

// Consecutive pieces of memory, on lines of their own; without memory it counts them.
template <class C>
struct Arena {
  C* data;
  Index taken = 0;

  C* take(Index n) {
    C* const piece = data ? data + taken : nullptr;
    taken += round_up(n, 64 / Index(sizeof(C)));
    return piece;
  }
  Panels<C> take_panels(Index depth, Index n) {
    return {depth, n, take(Panels<C>::size(depth, n))};
  }
};

// What `Made` takes from pieces of this thread's scratch memory.
template <class Made, class C, class... Args>
static Made in_scratch(Slot slot, const Args&... args) {
  Arena<C> count{nullptr};
  Made(count, args...);
  Arena<C> space{scratch<C>(slot, count.taken)};
  return Made(space, args...);
}

}  // namespace hyperfast::HF_ISA
