// wgmma: D [64, N] += A [64, 16] * B [16, N], by the four warps of a warpgroup; A in registers, B in shared memory.
//
// Fragments, for lane 4 * g + q of warp w: a[2 * c + r] holds row 16 * w + 8 * r + g and k = 8 * c + 2 * q and the next;
// d[4 * j + 2 * r + e] row 16 * w + 8 * r + g and column 8 * j + 2 * q + e. B has one row of 128 bytes (64 numbers along
// k) a column of D, rows in eights of 1024 bytes, its 16-byte chunks permuted within a row: chunk c of row n lies at
// c ^ (n % 8) ("128-byte swizzle"). 16 numbers along k further is 32 bytes further in the descriptor.
#pragma once
#include "hopper.cuh"

//
// The lower word of a descriptor; the upper one is always the same.
__device__ __forceinline__ u32 operand(u32 address) { return 1 << 16 | (address & 0x3ffff) >> 4; }
constexpr u32 OPERAND_HIGH = 1 << 30 | 1024 / 16;  // 128-byte swizzle; bytes from eight rows to the next
constexpr u32 NEXT_16 = 32 / 16;                   // added to a descriptor: the next 16 numbers along k

// Registers written before are seen by the products that follow.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most PENDING of the groups committed so far are unfinished.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// clang-format off
#define MILO_D8 "%0,%1,%2,%3"
#define MILO_D16 MILO_D8 ",%4,%5,%6,%7"
#define MILO_D24 MILO_D16 ",%8,%9,%10,%11"
#define MILO_D32 MILO_D24 ",%12,%13,%14,%15"
#define MILO_D40 MILO_D32 ",%16,%17,%18,%19"
#define MILO_D48 MILO_D40 ",%20,%21,%22,%23"
#define MILO_D56 MILO_D48 ",%24,%25,%26,%27"
#define MILO_D64 MILO_D56 ",%28,%29,%30,%31"
#define MILO_D72 MILO_D64 ",%32,%33,%34,%35"
#define MILO_D80 MILO_D72 ",%36,%37,%38,%39"
#define MILO_D88 MILO_D80 ",%40,%41,%42,%43"
#define MILO_D96 MILO_D88 ",%44,%45,%46,%47"
#define MILO_D104 MILO_D96 ",%48,%49,%50,%51"
#define MILO_D112 MILO_D104 ",%52,%53,%54,%55"
#define MILO_D120 MILO_D112 ",%56,%57,%58,%59"
#define MILO_D128 MILO_D120 ",%60,%61,%62,%63"
#define MILO_D136 MILO_D128 ",%64,%65,%66,%67"
#define MILO_D144 MILO_D136 ",%68,%69,%70,%71"
#define MILO_D152 MILO_D144 ",%72,%73,%74,%75"
#define MILO_D160 MILO_D152 ",%76,%77,%78,%79"
#define MILO_O8 MILO_FOUR(0)
#define MILO_O16 MILO_O8, MILO_FOUR(4)
#define MILO_O24 MILO_O16, MILO_FOUR(8)
#define MILO_O32 MILO_O24, MILO_FOUR(12)
#define MILO_O40 MILO_O32, MILO_FOUR(16)
#define MILO_O48 MILO_O40, MILO_FOUR(20)
#define MILO_O56 MILO_O48, MILO_FOUR(24)
#define MILO_O64 MILO_O56, MILO_FOUR(28)
#define MILO_O72 MILO_O64, MILO_FOUR(32)
#define MILO_O80 MILO_O72, MILO_FOUR(36)
#define MILO_O88 MILO_O80, MILO_FOUR(40)
#define MILO_O96 MILO_O88, MILO_FOUR(44)
#define MILO_O104 MILO_O96, MILO_FOUR(48)
#define MILO_O112 MILO_O104, MILO_FOUR(52)
#define MILO_O120 MILO_O112, MILO_FOUR(56)
#define MILO_O128 MILO_O120, MILO_FOUR(60)
#define MILO_O136 MILO_O128, MILO_FOUR(64)
#define MILO_O144 MILO_O136, MILO_FOUR(68)
#define MILO_O152 MILO_O144, MILO_FOUR(72)
#define MILO_O160 MILO_O152, MILO_FOUR(76)
#define MILO_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MILO_WGMMA(N, TYPE, A0, A1, A2, A3, LOW, HIGH)                                                                \
  asm volatile("{.reg .pred p; .reg .b64 b; setp.eq.u32 p, 0, 0; mov.b64 b, {%" #LOW ", %" #HIGH "};\n"               \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MILO_D##N "}, "                   \
               "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, b, p, 1, 1, 0;}"                                               \
               : MILO_O##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(OPERAND_HIGH))
#define MILO_CASE(N, ...)                                                                                             \
  if constexpr (WIDTH == N) {                                                                                         \
    if constexpr (B16) MILO_WGMMA(N, "bf16", __VA_ARGS__); else MILO_WGMMA(N, "f16", __VA_ARGS__);                    \
  }

// For the widths of items and half of them.
template <bool B16, int WIDTH>
__device__ __forceinline__ void product(float* d, const u32* a, u32 b) {
  MILO_CASE(16, 8, 9, 10, 11, 12, 13)
  MILO_CASE(24, 12, 13, 14, 15, 16, 17)
  MILO_CASE(32, 16, 17, 18, 19, 20, 21)
  MILO_CASE(40, 20, 21, 22, 23, 24, 25)
  MILO_CASE(48, 24, 25, 26, 27, 28, 29)
  MILO_CASE(56, 28, 29, 30, 31, 32, 33)
  MILO_CASE(64, 32, 33, 34, 35, 36, 37)
  MILO_CASE(72, 36, 37, 38, 39, 40, 41)
  MILO_CASE(80, 40, 41, 42, 43, 44, 45)
  MILO_CASE(96, 48, 49, 50, 51, 52, 53)
  MILO_CASE(112, 56, 57, 58, 59, 60, 61)
  MILO_CASE(128, 64, 65, 66, 67, 68, 69)
  MILO_CASE(144, 72, 73, 74, 75, 76, 77)
  MILO_CASE(160, 80, 81, 82, 83, 84, 85)
}
// clang-format on
