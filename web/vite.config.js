import { defineConfig } from "vite";

// One script and one style sheet with fixed names, beside the page that asks for them. No hash, no source map, no
// date: the same source gives the same bytes on any machine.
export default defineConfig({
  publicDir: false,
  esbuild: { jsx: "automatic", jsxImportSource: "preact", legalComments: "none", charset: "utf8" },
  build: {
    outDir: "../src/pellucid/glass/static",
    emptyOutDir: false,
    target: "es2022",
    cssCodeSplit: false,
    sourcemap: false,
    modulePreload: false,
    reportCompressedSize: false,
    rollupOptions: {
      input: "src/main.tsx",
      output: { format: "iife", entryFileNames: "glass.js", assetFileNames: "glass[extname]", inlineDynamicImports: true },
    },
  },
});
