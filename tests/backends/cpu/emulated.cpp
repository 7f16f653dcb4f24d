// Runs the kernel library behind a pipe, so that an emulator of another CPU can: a request is a letter
// and what it needs, an answer the result. emulation.py is the other side.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tiles.h"

extern "C" {
const char* sdm_isa();
int32_t sdm_run(const Call*);
int32_t sdm_pack(const void*, const uint8_t*, uint8_t*);
}

namespace {

void read(void* to, size_t bytes) {
  if (bytes && fread(to, 1, bytes, stdin) != bytes) exit(0);
}

void write(const void* from, size_t bytes) { fwrite(from, 1, bytes, stdout); }

// Memory of its own for each tensor: its size, then its bytes if the caller sends them; -1: none.
struct Buffer {
  int64_t size = 0;
  void* data = nullptr;
  explicit Buffer(bool sent) {
    read(&size, sizeof size);
    if (size >= 0) data = aligned_alloc(64, (size + 128) / 64 * 64);
    if (size > 0 && sent) read(data, size);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data); }
};

void answer_run() {
  Call call;
  read(&call, sizeof call);
  Buffer weight(true), x(true), bias(true), offset(true), norm_weight(true), norm_bias(true), out(false);
  call.weight = (const uint8_t*)weight.data;
  call.x = x.data;
  call.bias = bias.data;
  call.offset = (const float*)offset.data;
  call.norm_weight = (const float*)norm_weight.data;
  call.norm_bias = (const float*)norm_bias.data;
  call.out = out.data;
  const int32_t failed = sdm_run(&call);
  write(&failed, sizeof failed);
  write(out.data, out.size);
}

void answer_pack() {
  Buffer weight(true), mask(true), packed(true);
  const int32_t failed = sdm_pack(weight.data, (const uint8_t*)mask.data, (uint8_t*)packed.data);
  write(&failed, sizeof failed);
  write(packed.data, packed.size);
}

}  // namespace

int main() {
  char name[16] = {};
  strncpy(name, sdm_isa(), sizeof name - 1);
  write(name, sizeof name);
  for (;;) {
    fflush(stdout);
    char request;
    read(&request, 1);
    request == 'p' ? answer_pack() : answer_run();
  }
}
