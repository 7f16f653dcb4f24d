// The activation behind a product: ACT is its index in custom_op.ACTS. For the kernels of all families.

DEVICE float activated(float x) {
#if ACT == 1
  return 0.5f * x * (1.0f + erff(x * 0.70710678f));
#elif ACT == 2
  return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
#elif ACT == 3
  return x / (1.0f + expf(-x));
#else
  return x;
#endif
}
