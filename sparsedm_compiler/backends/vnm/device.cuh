// What vnm.cu needs of a GPU, in PTX: no headers, so that NVRTC needs no include path.
// tests/backends/vnm/emulator.h gives the same functions to a C++ compiler.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define DEVICE __device__ __forceinline__

extern __shared__ __align__(128) u8 shared_bytes[];

// Where a byte of shared memory is, as instructions address it.
DEVICE u32 shared_at(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

DEVICE u32 lane_id() { return threadIdx.x & 31; }

// 16 bytes from global to shared memory, of which the first `bytes` are read and the rest zero.
DEVICE void copy_async(u32 to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes));
}

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until all but the last `left` groups of copies of this thread have arrived.
template <int left>
DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(left) : "memory");
}

// Four 8x8 matrices of 16-bit values, transposed. Lane 8i + r points to row r of matrix i; it
// gets of matrix i the rows 2 (lane % 4), + 1 at column lane / 4, the first in the lower half.
DEVICE void load_transposed(u32 (&to)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// An 8x8 matrix of which each lane holds row lane / 4, columns 2 (lane % 4), + 1: transposed.
DEVICE u32 transposed(u32 pair) {
  u32 out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(pair));
  return out;
}

#if CUDA_VERSION_NUMBER >= 12050
#define SPARSE_MMA "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define SPARSE_MMA "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
#if BFLOAT16
#define MMA_TYPES "bf16.bf16.f32"
#else
#define MMA_TYPES "f16.f16.f32"
#endif

// sum[16 x 8] += a[16 x 32, 2:4 sparse] b[32 x 8].
DEVICE void multiply_sparse(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
  asm volatile(SPARSE_MMA MMA_TYPES
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3},"
               " %12, 0x0;\n"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                 "r"(b[3]), "r"(meta));
}
