import { mount } from 'svelte';
import App from './App.svelte';
import './app.css';
import { ready } from './words.svelte.js';

ready.then(() => mount(App, { target: document.body }));
