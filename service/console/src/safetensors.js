// What a weights file says of itself: read here, before anything is sent.

const MOST = 100 << 20; // of a header; the server allows less

/** {tensors, parameters, dtypes}. Throws where the file is no safetensors file. */
export async function read(file) {
  const start = new DataView(await file.slice(0, 8).arrayBuffer());
  const length = start.byteLength === 8 ? Number(start.getBigUint64(0, true)) : NaN;
  if (!(length > 1 && length < MOST && length + 8 <= file.size)) {
    throw new Error('its first bytes are no header of safetensors');
  }
  const header = JSON.parse(await file.slice(8, 8 + length).text());
  delete header.__metadata__;
  const tensors = Object.values(header);
  return {
    tensors: tensors.length,
    parameters: tensors.reduce((sum, one) => sum + one.shape.reduce((a, b) => a * b, 1), 0),
    dtypes: [...new Set(tensors.map((one) => one.dtype))].join(', '),
  };
}
