// Which bodies run: chosen once from cpuid and what the operating system saves, lowered on request.
#pragma once

#include "ops.h"

namespace percard {

enum Isa : int { kScalar = 0, kAvx2, kAvxVnni, kAvx512Vnni, kAmxInt8, kIsaCount };

const char* isa_name(int isa);
bool isa_available(int isa);  // this CPU and this operating system can run it
int current_isa();
void force_isa(int isa);  // from now on run these bodies; the caller has asked isa_available
const Ops& ops();         // the bodies of current_isa()

}  // namespace percard
