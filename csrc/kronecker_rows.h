// The rows of kronecker.cpp, for each vector unit.
#include "kronecker_begin_rows.h"
#include "kronecker_mix_rows.h"
