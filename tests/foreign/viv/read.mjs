// Prints, as a line of JSON for each OME-Zarr, what Viv's loaders read of it over HTTP.
// Usage: node read.mjs FOLDER NAME...

import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { createServer } from 'node:http';
import { join } from 'node:path';

import { loadOmeZarr } from '@vivjs/loaders';

// JSON has no NaN: null.
const plain = values => Array.from(values, value => (Number.isNaN(value) ? null : value));

// A level put together from tiles, as viewers ask for them.
async function fromTiles(level, width, height) {
  const size = level.tileSize;
  const values = new Float32Array(width * height).fill(-1);
  for (let y = 0; y * size < height; y++) {
    for (let x = 0; x * size < width; x++) {
      const tile = await level.getTile({ x, y, selection: {} });
      for (let row = 0; row < tile.height; row++) {
        const line = tile.data.subarray(row * tile.width, (row + 1) * tile.width);
        values.set(line, (y * size + row) * width + x * size);
      }
    }
  }
  return values;
}

async function read(url) {
  const { data, metadata } = await loadOmeZarr(url, { type: 'multiscales' });
  const levels = [];
  for (const level of data) {
    const { width, height, data: values } = await level.getRaster({ selection: {} });
    levels.push({
      shape: level.shape,
      dtype: level.dtype,
      labels: level.labels,
      tile_px: level.tileSize,
      values: plain(values),
      tiles: plain(await fromTiles(level, width, height))
    });
  }
  return { metadata, levels };
}

const [folder, ...names] = process.argv.slice(2);
const server = createServer(async (request, response) => {
  const file = join(folder, decodeURIComponent(request.url));
  const found = await stat(file).catch(() => null);
  if (found?.isFile()) createReadStream(file).pipe(response);
  else response.writeHead(404).end();
});
await new Promise(ready => server.listen(0, '127.0.0.1', ready));
for (const name of names) {
  const url = `http://127.0.0.1:${server.address().port}/${encodeURIComponent(name)}`;
  console.log(JSON.stringify(await read(url)));
}
server.closeAllConnections();
server.close();
