// Bundles qcc.js and page.js: node build.mjs NODE_MODULES TVM_WEB_SOURCES OUT
import { copyFileSync, mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const [modules, tvm, out] = process.argv.slice(2).map((path) => resolve(path));
const here = dirname(fileURLToPath(import.meta.url));
const esbuild = createRequire(join(modules, "package.json"))("esbuild");

// TVM's sources reach for node and for its own WASI; in a browser neither is there.
const tvmjs = {
  name: "tvmjs",
  setup(build) {
    build.onResolve({ filter: /^tvmjs$/ }, () => ({ path: join(tvm, "runtime.ts") }));
    build.onResolve({ filter: /^(ws|perf_hooks)$|tvmjs_runtime_wasi$/ }, ({ path }) => ({
      path,
      namespace: "nothing",
    }));
    build.onLoad({ filter: /.*/, namespace: "nothing" }, () => ({
      contents: "export default class {}",
    }));
  },
};
const options = {
  bundle: true,
  charset: "utf8",
  format: "esm",
  legalComments: "none", // the licences are files of their own
  logLevel: "warning",
  minify: true,
  nodePaths: [modules],
  platform: "browser",
  sourcemap: false,
  target: "es2022",
  tsconfigRaw: "{}",
};
mkdirSync(out, { recursive: true });
await Promise.all([
  esbuild.build({
    ...options,
    entryPoints: [join(here, "src/index.ts")],
    outfile: join(out, "qcc.js"),
    plugins: [tvmjs],
  }),
  esbuild.build({
    ...options,
    entryPoints: [join(here, "page/main.ts"), join(here, "page/page.css")],
    entryNames: "page",
    external: ["./qcc.js"],
    outdir: out,
  }),
]);
copyFileSync(join(here, "src/qcc.d.ts"), join(out, "qcc.d.ts"));
copyFileSync(join(here, "page/index.html"), join(out, "index.html"));
