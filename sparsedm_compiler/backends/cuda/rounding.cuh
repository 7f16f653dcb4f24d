// Numbers of 16 bits, by instructions: BFLOAT16 says of which kind. For the kernels of all families.

// Two floats rounded to 16 bits, the first in the lower half.
DEVICE u32 rounded(float low, float high) {
  u32 out;
#if BFLOAT16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
#endif
  return out;
}

DEVICE float widened(u16 value) {
  float out;
#if BFLOAT16
  out = __uint_as_float((u32)value << 16);
#else
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(out) : "h"(value));
#endif
  return out;
}
