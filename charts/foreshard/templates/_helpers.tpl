{{- define "foreshard.labels" -}}
app.kubernetes.io/name: foreshard
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: operator
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "foreshard.selector" -}}
app.kubernetes.io/name: foreshard
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "foreshard.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{- end -}}
{{- end -}}
{{- end -}}

{{- /* What the operator does in namespaces with jobs. It makes secrets there, and cannot read any. */ -}}
{{- define "foreshard.rules" -}}
- apiGroups: [foreshard.dev]
  resources: [trainingjobs]
  verbs: [get, list, watch, delete]
- apiGroups: [foreshard.dev]
  resources: [trainingjobs/status, partitionplans/status]
  verbs: [patch]
# Objects it makes are owned by jobs and block their deletion in the foreground.
- apiGroups: [foreshard.dev]
  resources: [trainingjobs/finalizers]
  verbs: [update]
- apiGroups: [foreshard.dev]
  resources: [partitionplans]
  verbs: [get, list, watch, create]
- apiGroups: [foreshard.dev]
  resources: [modelprofiles]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services, configmaps]
  verbs: [create, patch]
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create, patch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end -}}
