// FXPRUNE_UNROLL in front of a loop of constant length unrolls it fully. Every loop over an array
// of registers needs it: one that stays a loop indexes the array, and that puts all of it into
// memory.
#pragma once

#if defined(__clang__)
#define FXPRUNE_UNROLL _Pragma("unroll")
#else
#define FXPRUNE_UNROLL _Pragma("GCC unroll 32")
#endif
