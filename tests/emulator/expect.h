// What a test program holds to be true: if it is not, the program ends with 1 and names the line.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <source_location>

inline void expect(bool right, std::source_location site = std::source_location::current()) {
  if (right) return;
  std::fprintf(stderr, "%s:%u: wrong\n", site.file_name(), static_cast<unsigned>(site.line()));
  std::exit(1);
}
