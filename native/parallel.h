// The thread pool: pieces of one job are claimed by whoever is awake.
//
// The caller works too, and waits only for pieces that another thread has begun. A helper that the operating system has not
// woken yet, or whose core a neighbour holds, costs nothing: the caller does its pieces. Idle helpers sleep; they look for
// the next job for some microseconds first, since the products of one token follow each other closely.
#pragma once

namespace arrondi {

using Piece = void (*)(void* context, int piece);

// Calls run(context, piece) for every piece in [0, pieces), on at most `threads` threads; returns when all are done.
// Called from two threads at once, or from inside a piece, the second one runs its pieces alone.
void parallel(int pieces, int threads, Piece run, void* context);

// The same for a callable.
template <class Function>
void parallel_for(int pieces, int threads, const Function& function) {
    parallel(
        pieces, threads, [](void* context, int piece) { (*static_cast<const Function*>(context))(piece); },
        const_cast<Function*>(&function));
}

}  // namespace arrondi
