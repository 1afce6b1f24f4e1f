// The official Node client, unmodified. argv: base URL, key, model. OPENAI_MODULE: the installed package.
import { pathToFileURL } from 'node:url';
const { default: OpenAI } = await import(pathToFileURL(process.env.OPENAI_MODULE).href);
const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: 'user', content: 'What is the capital of France?' }];
const shared = { model, messages, temperature: 0, max_completion_tokens: 12 };
const whole = await client.chat.completions.create(shared);
let streamed = '', usage = 0;
for await (const chunk of await client.chat.completions.create({
  ...shared, stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta?.content ?? '';
  usage = chunk.usage?.completion_tokens ?? usage;
}
const completion = await client.completions.create({ model, prompt: 'Once upon a time', max_tokens: 5, temperature: 0 });
const models = [];
for await (const card of client.models.list()) models.push(card.id);
const embedded = await client.embeddings.create({ model, input: ['one', 'two'] });
const response = await client.responses.create({ model, input: 'What is the capital of France?', temperature: 0, max_output_tokens: 12 });
let refused = null;
try { await client.chat.completions.create({ ...shared, model: 'nobody' }); } catch (error) { refused = [error.status, error.code]; }
console.log(JSON.stringify({
  text: whole.choices[0].message.content, streamed, usage, models, completion: completion.choices[0].text,
  embeddings: embedded.data.map((one) => one.embedding.length), response: response.output_text, refused }));
