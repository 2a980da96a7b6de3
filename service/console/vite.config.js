import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig } from 'vite';

export default defineConfig({
  base: './', // the console may stand behind a prefix
  plugins: [
    svelte({
      onwarn(warning) {
        // What the compiler says of accessibility is not advice here.
        throw new Error(`${warning.code}: ${warning.message} (${warning.filename})`);
      },
    }),
  ],
  build: {
    outDir: 'built',
    assetsDir: 'console', // served under /console/
    assetsInlineLimit: 0, // the page's policy allows no data: URLs
    modulePreload: { polyfill: false },
    target: 'es2022',
  },
  // For work on the console itself: `npx vite` beside a server on 8080.
  server: { proxy: { '^/(?!src|node_modules|@|$|\\?)': 'http://127.0.0.1:8080' } },
});
