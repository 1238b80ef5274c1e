// CHECK for plain test programs: counts, prints the first failures, and gives main its exit code.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace duqpp::testing {

inline int g_checks = 0;
inline int g_failures = 0;

__attribute__((format(printf, 4, 5))) inline void report_failure(const char* file, int line,
                                                                 const char* condition,
                                                                 const char* format, ...) {
  constexpr int kPrinted = 20;
  if (++g_failures > kPrinted) return;
  std::fprintf(stderr, "%s:%d: not true: %s: ", file, line, condition);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
}

inline int finish(const char* program) {
  std::printf("%s: %d checks, %d failures\n", program, g_checks, g_failures);
  return g_failures == 0 && g_checks > 0 ? 0 : 1;
}

}  // namespace duqpp::testing

// CHECK(condition, "format", values...): the message says where in the data the condition failed.
#define CHECK(condition, ...)                                                        \
  do {                                                                               \
    ++::duqpp::testing::g_checks;                                                    \
    if (!(condition)) {                                                              \
      ::duqpp::testing::report_failure(__FILE__, __LINE__, #condition, __VA_ARGS__); \
    }                                                                                \
  } while (false)
