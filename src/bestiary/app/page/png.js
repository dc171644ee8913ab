// Text in PNG files.

const END_OF_HEADER = 8 + 25; // bytes: the signature and the IHDR chunk

/** The PNG with an international text chunk after its header (PNG specification, 11.3.3). */
export function withText(png, keyword, words) {
  const chunk = new TextEncoder().encode(`iTXt${keyword}\0\0\0\0\0${words}`);
  const parts = [png.slice(0, END_OF_HEADER), uint32(chunk.length - 4), chunk, uint32(crc32(chunk)), png.slice(END_OF_HEADER)];
  return new Blob(parts, { type: 'image/png' });
}

function uint32(value) {
  const bytes = new DataView(new ArrayBuffer(4));
  bytes.setUint32(0, value);
  return bytes;
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
