// After a build: writes down of which sources it was made. tests/service/api/test_console.py holds
// the built files against it, and does not need Node.
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const ROOTS = ['index.html', 'package.json', 'package-lock.json', 'stamp.js', 'vite.config.js', 'src'];

function files(path) {
  return statSync(path).isDirectory()
    ? readdirSync(path).flatMap((name) => files(join(path, name)))
    : [path];
}

function digest(paths) {
  const lines = paths
    .map((path) => path.replaceAll('\\', '/'))
    .sort((a, b) => (a < b ? -1 : a > b ? 1 : 0))
    .map((path) => `${createHash('sha256').update(readFileSync(path)).digest('hex')}  ${path}\n`);
  return createHash('sha256').update(lines.join('')).digest('hex');
}

const built = files('built').filter((path) => !path.endsWith('stamp.json'));
const stamp = { sources: digest(ROOTS.flatMap(files)), built: digest(built) };
writeFileSync('built/stamp.json', JSON.stringify(stamp, null, 2) + '\n');
