{{- /* Where a container finds the store, and what this machine is called there. */ -}}
{{- define "store" -}}
env:
  - name: STORE
    value: {{ .Values.store }}
  - name: POD
    valueFrom:
      fieldRef:
        fieldPath: metadata.name
envFrom:
  - secretRef:
      name: {{ .Values.credentials }}
      optional: true
{{- end -}}

{{- /* What containers of the image `tools` have in common; whether they only watch. */ -}}
{{- define "tools" -}}
{{ include "hardened" . }}
resources:
  requests:
    cpu: 100m
    memory: 512Mi
  limits:
    memory: 1Gi
volumeMounts:
  - name: models
    mountPath: /models
    {{- if . }}
    readOnly: true
  - name: status
    mountPath: /run/spikeless
    readOnly: true
    {{- end }}
  - name: scratch
    mountPath: /tmp
{{- end -}}

{{- define "hardened" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{- /* A duration, such as 5m, in milliseconds. */ -}}
{{- define "milliseconds" -}}
{{- $unit := trimAll "0123456789" . -}}
{{- $number := trimSuffix $unit . | int -}}
{{- mul $number (get (dict "s" 1000 "m" 60000 "h" 3600000) $unit) -}}
{{- end -}}
