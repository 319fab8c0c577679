// Calls of a driver that fail where the environment says so: FAKE_FAIL=CreateBuffer:-4:10 is the tenth call of that
// name, and all after it, giving error -4.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Whether this call is to fail, and how.
inline int32_t status_of(const char* call) {
  static int num_calls = 0;
  const char* wanted = std::getenv("FAKE_FAIL");
  char name[64];
  int code = 0, first = 1;
  if (!wanted || std::sscanf(wanted, "%63[^:]:%d:%d", name, &code, &first) < 2 || std::strcmp(name, call)) return 0;
  return ++num_calls >= first ? code : 0;
}
