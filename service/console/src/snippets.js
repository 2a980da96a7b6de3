// The same request outside of the console.

export function curl(origin, path, body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", `'\\''`);
  return `curl -s ${origin}${path} -H 'content-type: application/json' -d '${quoted}'\n`;
}

export function python(origin, path, body) {
  return [
    'import json',
    'import urllib.request',
    '',
    `body = ${literal(body, '')}`,
    'request = urllib.request.Request(',
    `    ${JSON.stringify(origin + path)},`,
    '    data=json.dumps(body).encode(),',
    '    headers={"content-type": "application/json"},',
    ')',
    'with urllib.request.urlopen(request) as reply:',
    '    print(json.load(reply)["generated_text"])',
    '',
  ].join('\n');
}

// JSON's texts are Python's too; its true, false and null are not.
function literal(value, indent) {
  const deeper = indent + '    ';
  if (value === null || value === undefined) return 'None';
  if (value === true) return 'True';
  if (value === false) return 'False';
  if (typeof value !== 'object') return JSON.stringify(value);
  const list = Array.isArray(value);
  const parts = list
    ? value.map((one) => deeper + literal(one, deeper))
    : Object.entries(value)
        .filter(([, one]) => one !== undefined)
        .map(([key, one]) => `${deeper}${JSON.stringify(key)}: ${literal(one, deeper)}`);
  const [open, close] = list ? '[]' : '{}';
  return parts.length ? `${open}\n${parts.join(',\n')},\n${indent}${close}` : open + close;
}
