// Stand-in for emscripten's header: the linker is told what to export, so nothing asks for it here.
#pragma once

#define EMSCRIPTEN_KEEPALIVE
