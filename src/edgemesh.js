#!/usr/bin/env node
/**
 * The bin of the package. A checkout has the sources, which Node runs as they are; an installed package has what `npm pack`
 * compiled of them, because Node strips no types below node_modules.
 */
import { existsSync } from 'node:fs'

const source = new URL('./main.ts', import.meta.url)
await import(existsSync(source) ? source.href : new URL('../dist/main.js', import.meta.url).href)
