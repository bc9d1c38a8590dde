// Names what LLVM may call in a model's code for wasm, so that it comes along from the libraries.
#include <math.h>
#include <stdint.h>

extern "C" {

uint16_t __truncsfhf2(float);
uint16_t __truncdfhf2(double);
float __extendhfsf2(uint16_t);
__int128 __multi3(__int128, __int128);

extern const void* const qcc_called_by_llvm[];
const void* const qcc_called_by_llvm[] = {
    (const void*)&cosf, (const void*)&expf, (const void*)&exp2f, (const void*)&logf,
    (const void*)&log2f, (const void*)&log10f, (const void*)&powf, (const void*)&sinf,
    (const void*)&tanf, (const void*)&tanhf, (const void*)&fmodf, (const void*)&roundf,
    (const void*)static_cast<double (*)(double)>(&cos),
    (const void*)static_cast<double (*)(double)>(&exp),
    (const void*)static_cast<double (*)(double)>(&exp2),
    (const void*)static_cast<double (*)(double)>(&log),
    (const void*)static_cast<double (*)(double)>(&log2),
    (const void*)static_cast<double (*)(double)>(&log10),
    (const void*)static_cast<double (*)(double, double)>(&pow),
    (const void*)static_cast<double (*)(double)>(&sin),
    (const void*)static_cast<double (*)(double)>(&tan),
    (const void*)static_cast<double (*)(double)>(&tanh),
    (const void*)static_cast<double (*)(double, double)>(&fmod),
    (const void*)static_cast<double (*)(double)>(&round),
    (const void*)&__truncsfhf2, (const void*)&__truncdfhf2, (const void*)&__extendhfsf2,
    (const void*)&__multi3,
};

}  // extern "C"
