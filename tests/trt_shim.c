/* Stands for libnvinfer.so.11, libnvinfer_plugin.so.11 and libnvonnxparser.so.11 and forwards the factories of the Python bindings to the
   libraries of TensorRT-RTX, under the version number these expect. Compiled with -DINFER=path -DPARSER=path -DVERSION=number. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void *find(const char *library, const char *name) {
    void *handle = dlopen(library, RTLD_NOW | RTLD_GLOBAL);
    void *symbol = handle ? dlsym(handle, name) : NULL;
    if (!symbol) {
        fprintf(stderr, "%s: %s\n", name, dlerror());
        abort();
    }
    return symbol;
}

typedef void *(*Create)(void *, int);
typedef void *(*CreateOn)(void *, void *, int);

void *createInferBuilder_INTERNAL(void *logger, int version) { return ((Create)find(INFER, __func__))(logger, VERSION); }
void *createInferRuntime_INTERNAL(void *logger, int version) { return ((Create)find(INFER, __func__))(logger, VERSION); }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int version) { return ((CreateOn)find(INFER, __func__))(engine, logger, VERSION); }
void *getPluginRegistry(void) { return ((void *(*)(void))find(INFER, __func__))(); }
void *getBuilderPluginRegistry(int capability) { return getPluginRegistry(); }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) { return ((CreateOn)find(PARSER, __func__))(network, logger, VERSION); }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int version) { return ((CreateOn)find(PARSER, __func__))(refitter, logger, VERSION); }
int getNvOnnxParserVersion(void) { return VERSION; }
int initLibNvInferPlugins(void *logger, const char *name_space) { return 1; }
